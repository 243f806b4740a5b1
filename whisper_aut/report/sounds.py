"""The clips behind a run's written samples: found in its validation shards, to be listened to and looked at.

In: a run's `samples.jsonl` and `config.yaml`. Out: `report.page.Listened`s. Next: `report.html`. A clip is stored again as 16 kHz Ogg
Vorbis, which browsers play and which is small; its picture is the log-mel that the encoder sees.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from matplotlib.image import imsave

from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.shards import open_index
from whisper_aut.corpora.tables import read_lines
from whisper_aut.data.logmel import LogMel, mel_frames
from whisper_aut.data.sample import Sample, iter_samples
from whisper_aut.data.waveform import SAMPLE_RATE_HZ, load_waveform
from whisper_aut.errors import SampleRefused, UserError
from whisper_aut.report.page import Listened

PER_TASK, MOST = 2, 18
MAX_SEARCHED = 20_000  # samples of a validation source that are gone through
MAX_HEARD_SECONDS = 30
MEL_BINS = 80


@dataclass(frozen=True)
class Written:
    """A line of `samples.jsonl`."""

    step: int
    domain: str
    task: str
    key: str
    reference: str
    generated: str


def last_written(samples: Path) -> list[Written]:
    """Return some of what the decoder wrote at the last validation, alike many of each task."""
    entries = [entry for line in _lines(samples) if (entry := _entry(line))]
    newest = max((entry.step for entry in entries), default=0)
    chosen: dict[str, list[Written]] = {}
    for entry in entries:
        if (
            entry.step == newest
            and len(chosen.setdefault(f"{entry.domain} {entry.task}", [])) < PER_TASK
        ):
            chosen[f"{entry.domain} {entry.task}"].append(entry)
    return [entry for listed in chosen.values() for entry in listed][:MOST]


def listened(run: Path) -> list[Listened]:
    """Return a run's last samples with their clips, where its validation shards are still there."""
    written = last_written(run / "samples.jsonl")
    clips = dict(_clips(_validation_folders(run / "config.yaml"), {entry.key for entry in written}))
    return [_listened(entry, clips) for entry in written]


def _listened(entry: Written, clips: Mapping[str, np.ndarray]) -> Listened:
    title = f"{entry.domain} · {entry.task or 'text'} · {entry.key}"
    heard = clips.get(entry.key)
    title += f" · {len(heard) / SAMPLE_RATE_HZ:.1f} s" if heard is not None else ""
    if heard is None:
        return Listened(title, entry.reference, entry.generated)
    return Listened(title, entry.reference, entry.generated, _ogg(heard), _spectrogram(heard))


def _lines(samples: Path) -> list[str]:
    try:
        return read_lines(samples)
    except (OSError, UnicodeDecodeError):
        return []


def _entry(line: str) -> Written | None:
    try:
        facts = json.loads(line)
        return Written(
            int(facts["step"]),
            *(
                str(facts.get(name, ""))
                for name in ("domain", "task", "key", "reference", "generated")
            ),
        )
    except (ValueError, KeyError, TypeError):
        return None  # a line that a killed run did not finish


def _validation_folders(config: Path) -> list[str]:
    try:
        return [source["path"] for source in yaml.safe_load(config.read_text())["data"]["valid"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []


def _clips(folders: Sequence[str], keys: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    wanted = set(keys)
    for folder in folders:
        try:
            for number, sample in enumerate(iter_samples(open_index(folder), ClipLimits())):
                if not wanted or number == MAX_SEARCHED:
                    break
                if isinstance(sample, Sample) and sample.key in wanted:
                    wanted.remove(sample.key)
                    yield sample.key, load_waveform(sample.audio, ClipLimits()).numpy()
        except (UserError, SampleRefused, OSError):
            continue  # shards that have moved since: their samples stand without sound


def _ogg(waveform: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    peak = max(float(np.abs(waveform).max(initial=0)), 1e-4)
    audible = waveform[: MAX_HEARD_SECONDS * SAMPLE_RATE_HZ] * min(1.0, 0.95 / peak)
    soundfile.write(buffer, audible, SAMPLE_RATE_HZ, format="OGG", subtype="VORBIS")
    return buffer.getvalue()


def _spectrogram(waveform: np.ndarray) -> bytes:
    mel = LogMel(MEL_BINS)(torch.from_numpy(waveform))[: mel_frames(len(waveform))]
    buffer = io.BytesIO()
    imsave(buffer, mel.T.flip(0).numpy(), cmap="magma", format="png")  # a pixel a bin and frame
    return buffer.getvalue()
