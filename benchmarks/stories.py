"""A small model on the demo corpus, and the overrides with which `whisper-aut train` runs it: what
`epoch` and `overhead` share.
"""

from pathlib import Path

from demo import waveforms_and_samples

from whisper_aut.config import Settings, load_settings
from whisper_aut.models.tiny import make_whisper

CONFIG = Path(__file__).parents[1] / "conf" / "aut_tiny.yaml"
BATCH_CLIPS = 8


def small_whisper(
    corpus: Path, out: Path, width: int = 128, layers: int = 3, heads: int = 4
) -> Path:
    """The size of `conf/speech_tiny.yaml`, random weights, and the corpus's own tokenizer."""
    texts = [
        sample.annotation.text
        for domain in ("speech", "sound")
        for _, sample in waveforms_and_samples(corpus / "train" / domain)
    ]
    return make_whisper(
        out,
        texts,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        heads=heads,
        num_mel_bins=80,
        vocabulary=1500,
        seed=0,
    )


def overrides(corpus: Path, model: Path, clips: int) -> list[str]:
    """One epoch of so many clips, without validation and probes."""
    return [
        f"data.shards={corpus.parent}",
        f"runs={corpus.parent / 'runs'}",
        f"model.path={model}",
        "model.after=",
        "corpora.demo=null",
        "data.valid=[]",
        f"data.batch_clips={BATCH_CLIPS}",
        f"data.samples_per_epoch={clips}",
        "trainer.max_epochs=1",
        "trainer.max_steps=null",
        "export=[whisper]",
        "probe.tasks=[]",
    ]


def story_settings(corpus: Path, model: Path, clips: int) -> Settings:
    return load_settings(CONFIG, overrides(corpus, model, clips))
