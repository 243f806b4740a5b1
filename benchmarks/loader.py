"""Tar shards to 16 kHz waveforms in one process and one thread: our reader against webdataset with
soundfile and torchaudio's resampler, against X-ARES's loader where it is installed, and against
soundfile alone on bytes that are in memory already.

Clips of 5 s of coloured noise with a tone. Both sides read the same tars, all clips of them; their
outputs are compared before anything is timed, in seconds of CPU time. The resamplers are different
filters, so the comparison is below 6 kHz, where both pass everything.
"""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
import torchaudio
from pairs import Row, compare_values, main
from torch.testing import assert_close
from webdataset.compat import WebDataset
from xares_peer import clips, installed

from whisper_aut.audio.decode import ClipLimits, load_waveform
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import ShardIndex, ShardReader, open_index
from whisper_aut.data.writer import ShardWriter

CLIPS, SECONDS = 40, 5.0
CASES = (("flac 16k", "flac", "FLAC", 16_000), ("ogg 44.1k", "ogg", "OGG", 44_100))
LIMITS = ClipLimits()


def cases(runs: int) -> Iterator[Row]:
    for name, suffix, kind, rate in CASES:
        with TemporaryDirectory() as folder:
            index = shards(Path(folder), suffix, kind, rate)
            urls = [index.url(number) for number in range(len(index.shards))]
            encoded = [
                sample[suffix] for sample in WebDataset(urls, shardshuffle=False, empty_check=False)
            ]
            same_clips(ours(index), plain(urls, suffix))
            same_clips(ours(index), raw(encoded))
            yield compare_values(
                f"{name}, {CLIPS} clips of {SECONDS:g} s",
                lambda index=index: cpu_seconds(ours, index),
                lambda urls=urls, suffix=suffix: cpu_seconds(plain, urls, suffix),
                unit="s",
                against="webdataset + soundfile + torchaudio.functional.resample",
                runs=runs,
            )
            if installed():
                same_clips(ours(index), clips(urls))
                yield compare_values(
                    f"{name}, X-ARES's loader",
                    lambda index=index: cpu_seconds(ours, index),
                    lambda urls=urls: cpu_seconds(clips, urls),
                    unit="s",
                    against=f"{installed()}, create_rawaudio_webdataset; "
                    "torchaudio.load by soundfile",
                    runs=runs,
                )
            yield compare_values(
                f"{name}, raw decoding",
                lambda index=index: cpu_seconds(ours, index),
                lambda encoded=encoded: cpu_seconds(raw, encoded),
                unit="s",
                against="soundfile on bytes in memory" + (", soxr HQ" if rate != 16_000 else ""),
                runs=runs,
            )


def cpu_seconds(side: Callable[..., Any], *arguments: Any) -> float:
    """Return CPU seconds of this process, reading included, whatever else the machine does."""
    start = time.process_time()
    side(*arguments)
    return time.process_time() - start


def shards(folder: Path, suffix: str, kind: str, rate: int) -> ShardIndex:
    random, samples = np.random.default_rng(0), round(SECONDS * rate)
    with ShardWriter(folder) as out:
        for number in range(CLIPS):
            noise = np.convolve(random.standard_normal(samples), np.ones(8) / 8, mode="same")
            clip = 0.1 * noise + 0.2 * np.sin(2 * np.pi * 300 * np.arange(samples) / rate)
            buffer = io.BytesIO()
            soundfile.write(buffer, clip.astype(np.float32), rate, format=kind)
            out.write(
                str(number),
                suffix,
                buffer.getvalue(),
                Annotation(text="x", domain="sound", duration_seconds=SECONDS),
            )
    return open_index(folder)


def ours(index: ShardIndex) -> list[torch.Tensor]:
    reader, clips = ShardReader(LIMITS), []
    for shard, entry in enumerate(index.shards):
        locations = {number: (shard, number) for number in range(entry.samples)}
        for item in reader.read(index, locations).values():
            assert isinstance(item, Sample)
            clips.append(load_waveform(item.audio, LIMITS))
    return clips


def plain(urls: list[str], suffix: str) -> list[torch.Tensor]:
    clips = []
    dataset: Any = WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    for sample in dataset:
        samples, rate = soundfile.read(io.BytesIO(sample[suffix]), dtype="float32", always_2d=True)
        waveform = torch.from_numpy(samples).mean(1)
        clips.append(
            torchaudio.functional.resample(waveform, rate, 16_000) if rate != 16_000 else waveform
        )
    return clips


def raw(encoded: list[bytes]) -> list[torch.Tensor]:
    clips = []
    for data in encoded:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        clips.append(
            torch.from_numpy(samples if rate == 16_000 else soxr.resample(samples, rate, 16_000))
        )
    return clips


def same_clips(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) == CLIPS
    for mine, other in zip(ours, theirs, strict=True):
        assert abs(len(mine) - len(other)) <= 1
        common = min(len(mine), len(other)) // 2 * 2
        spectra = [
            torch.fft.rfft(clip[:common] * torch.hann_window(common)) for clip in (mine, other)
        ]
        passed = round(6_000 * common / 16_000)
        scale = float(spectra[1].abs().max())
        assert_close(spectra[0][:passed] / scale, spectra[1][:passed] / scale, atol=1e-3, rtol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(cases, "Tar shards to 16 kHz waveforms, one process")
