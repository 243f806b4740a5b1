"""Clips of the synthesised demo corpus for benchmarks: built once a run in a temporary folder, read
as training reads them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from recipes import Clips
from torch import Tensor

from whisper_aut.audio.decode import ClipLimits, load_waveform
from whisper_aut.corpora.synth.corpus import build_demo
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.data.targets import WhisperText
from whisper_aut.models.tiny import train_whisper_tokenizer

MIXTURE = {"speech": 8, "sound": 1, "music": 1}  # AuT's 80/10/10
LIMITS = ClipLimits(min_seconds=0.1, max_seconds=30.0)


@contextmanager
def demo_corpus(scale: float) -> Iterator[Path]:
    """Synthesise a demo corpus and forget it afterwards."""
    with TemporaryDirectory() as folder:
        yield build_demo(Path(folder) / "demo", scale=scale, workers=1, progress=False)


def waveforms_and_samples(shards: Path) -> list[tuple[Tensor, Sample]]:
    items = iter_samples(open_index(shards), LIMITS)
    return [(load_waveform(item.audio, LIMITS), item) for item in items if isinstance(item, Sample)]


def demo_mixture(corpus: Path, rounds: int = 1) -> Clips:
    """The first clips of each domain in AuT's shares, with their texts as tokens."""
    chosen = [
        (waveform, sample, domain)
        for domain, share in MIXTURE.items()
        for waveform, sample in waveforms_and_samples(corpus / "train" / domain)[: share * rounds]
    ]
    codec = WhisperText(
        train_whisper_tokenizer([sample.annotation.text for _, sample, _ in chosen], 1500)
    )
    tokens = [
        codec.encode(sample.annotation, domain, place).tokens
        for place, (_, sample, domain) in enumerate(chosen)
    ]
    return Clips([waveform for waveform, _, _ in chosen], tokens)
