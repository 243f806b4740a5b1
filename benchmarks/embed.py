"""Embedding a folder of clips: `whisper-aut embed` against a loop over transformers' feature
extractor and encoder.

Both read the same files and run the same random whisper-tiny. The other side decodes with soundfile
and soxr, as ours does, takes batches of 16, pads each clip to 30 s as its feature extractor does,
and averages the frames that hold the clip. In `30s` mode the embeddings are equal, which is checked
before `none` mode is timed. `--data FOLDER` names a folder of audio files or one that holds
`esc10/`; without it the demo corpus is synthesised and written out. `--clips N` takes the first N.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile
import torch
from demo import demo_corpus, waveforms_and_samples
from pairs import Row, compare, main
from recipes import whisper_tiny
from torch import Tensor
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor, WhisperModel

import whisper_aut
from whisper_aut.audio.decode import to_mono_16k
from whisper_aut.audio.logmel import mel_frames
from whisper_aut.inference.embed import embed_paths

CLIPS, BATCH, CHECKED = 40, 16, 32
ENDINGS = {".wav", ".flac", ".ogg", ".mp3"}


def cases(runs: int) -> Iterator[Row]:
    with TemporaryDirectory() as folder:
        place = Path(folder)
        whisper_tiny().model.save_pretrained(place / "whisper")
        name, files = given_files(DATA) if DATA else written_demo(place)
        own, padded = (
            whisper_aut.load_encoder(place / "whisper", padding=padding)
            for padding in ("none", "30s")
        )
        theirs = WhisperModel.from_pretrained(place / "whisper").encoder.eval()
        assert_close(
            ours(padded, files[:CHECKED]), reference(theirs, files[:CHECKED]), atol=1e-4, rtol=1e-3
        )
        yield compare(
            f"{name}, {len(files)} clips",
            lambda: ours(own, files),
            lambda: reference(theirs, files),
            against="WhisperFeatureExtractor and WhisperModel's encoder in batches of 16, "
            "clips padded to 30 s",
            runs=runs,
        )


def ours(encoder: whisper_aut.AudioEncoder, files: list[Path]) -> Tensor:
    return embed_paths(encoder, [str(file) for file in files], name="whisper").values


@torch.inference_mode()
def reference(encoder: torch.nn.Module, files: list[Path]) -> Tensor:
    extractor, pooled = WhisperFeatureExtractor(feature_size=80), []
    for start in range(0, len(files), BATCH):
        waveforms = [read(file) for file in files[start : start + BATCH]]
        arrays = [waveform.numpy() for waveform in waveforms]
        hidden = encoder(
            extractor(arrays, sampling_rate=16_000, return_tensors="pt").input_features
        ).last_hidden_state
        valid = [-(-mel_frames(len(waveform)) // 2) for waveform in waveforms]
        pooled += [frames[:length].mean(0) for frames, length in zip(hidden, valid, strict=True)]
    return torch.stack(pooled)


def read(file: Path) -> Tensor:
    samples, rate = soundfile.read(file, dtype="float32")
    return to_mono_16k(samples, rate)


def given_files(folder: Path) -> tuple[str, list[Path]]:
    root = folder / "esc10" if (folder / "esc10").is_dir() else folder
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in ENDINGS)[
        :CLIPS_WANTED
    ]
    if not files:
        sys.exit(f"no audio files under {root}")
    return root.name, files


def written_demo(place: Path) -> tuple[str, list[Path]]:
    with demo_corpus(scale=0.03) as corpus:
        clips = [
            clip
            for domain in ("speech", "sound", "music")
            for clip, _ in waveforms_and_samples(corpus / "train" / domain)
        ]
    for number, clip in enumerate(clips[:CLIPS_WANTED]):
        soundfile.write(place / f"{number:03d}.flac", clip.numpy(), 16_000)
    return "demo", sorted(place.glob("*.flac"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--clips", type=int, default=CLIPS)
    options, sys.argv[1:] = parser.parse_known_args()
    DATA, CLIPS_WANTED = options.data, options.clips
    main(cases, "Embedding a folder, whisper-tiny shape")
