"""Ask the decoder of a trained run about clips, and evaluate its answers on whole shards.

This shows what the decoder learned. The purpose of a run is its encoder, which probes evaluate.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from whisper_aut.audio.decode import ClipLimits, load_file
from whisper_aut.audio.logmel import WINDOW_SECONDS, LogMel, mel_frames
from whisper_aut.audio.windows import BATCH_SECONDS, batches_by_seconds
from whisper_aut.data.batch import Example, collate
from whisper_aut.data.dataset import ExampleBuilder
from whisper_aut.data.ledger import Ledger, by_source
from whisper_aut.data.reader import Sample, SkippedSample
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.data.targets import DEFAULT_LANGUAGE, ChatText, TextCodec, WhisperText
from whisper_aut.errors import SkipReason, SkipSample, UserError
from whisper_aut.models.module import AnswerMetrics, AudioTextModule

CLIPS_AT_ONCE = 16


@runtime_checkable
class Askable(Protocol):
    """A codec whose decoder can be prompted with a question."""

    def encode_question(self, question: str) -> Tensor:
        """Return the prompt tokens `[L]` of a question."""
        ...


def answer(module: AudioTextModule, audio: Path, question: str, *, max_new_tokens: int = 64) -> str:
    """Answer a question about an audio file.

    Args:
        module: A trained run whose codec is `Askable`.
        audio: The file.
        question: The question, in words.
        max_new_tokens: The longest answer to generate.

    Raises:
        UserError: If the file cannot be used, or if the decoder takes no questions.
    """
    if not isinstance(module.codec, Askable):
        raise UserError(
            "The decoder of this run takes no questions; runs with decoder=causal_lm do."
        )
    return _written(module, audio, module.codec.encode_question(question), max_new_tokens)


def describe(
    module: AudioTextModule, audio: Path, *, domain: str = "sound", max_new_tokens: int = 64
) -> str:
    """Transcribe or caption an audio file with a run's Whisper decoder.

    Args:
        module: A trained run with a Whisper decoder.
        audio: The file.
        domain: The domain whose prompt is used.
        max_new_tokens: The longest text to generate.

    Raises:
        UserError: If the file cannot be used, or if the run has another decoder.
    """
    if not isinstance(module.codec, WhisperText):
        raise UserError("This run has no Whisper decoder: ask it a question.")
    prompt = torch.tensor(module.codec.prompt_tokens(domain, DEFAULT_LANGUAGE))
    return _written(module, audio, prompt, max_new_tokens)


@torch.inference_mode()
def _written(module: AudioTextModule, audio: Path, prompt: Tensor, max_new_tokens: int) -> str:
    try:
        waveform = load_file(audio, ClipLimits())
    except SkipSample as refused:
        missing = refused.reason is SkipReason.MISSING_FILE
        raise UserError(
            f"Cannot read {audio}: {refused.detail}."
            if missing
            else f"{audio} cannot be used: {refused}."
        ) from None
    mel = LogMel(module.encoder.num_mel_bins)(waveform).to(module.device)
    frames = module.encoder(mel, [mel_frames(len(waveform))])
    (tokens,) = module.decoder.generate(frames.values, frames.lengths, [prompt], max_new_tokens)
    return module.codec.decode(tokens)


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        figures: Metrics by name, such as `exact_sound_class`.
        clips: The number of clips that were evaluated.
        refused: The number of skipped clips, by source and reason.
        unknown_languages: The number of clips by language, for languages without a token.
    """

    figures: dict[str, float]
    clips: int
    refused: dict[str, dict[str, int]]
    unknown_languages: dict[str, int]


@torch.inference_mode()
def evaluate(
    module: AudioTextModule,
    shards: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    domain: str = "",
    limit: int | None = None,
    batch_seconds: float = BATCH_SECONDS,
    out: Path | None = None,
    max_new_tokens: int = 64,
) -> Evaluation:
    """Generate a text for every clip of some shards, and score it with its task's metrics.

    Args:
        module: A trained run.
        shards: Folders or URLs of shards.
        tasks: The tasks to choose from. By default one of all tasks is drawn for each clip, as in
            training.
        domain: The domain of clips whose annotation does not state one.
        limit: Use only this many clips of each folder, from its start.
        batch_seconds: Seconds of audio in a batch, padding included.
        out: A JSON-lines file for the key, domain, task, reference and answer of each clip.
        max_new_tokens: The longest answer to generate.

    Raises:
        UserError: If a task or the shards do not exist, or if tasks are given for a decoder that
            takes no questions.
    """
    codec = _codec_for(module.codec, tasks)
    build = ExampleBuilder(LogMel(module.encoder.num_mel_bins), codec, ClipLimits())
    metrics, ledger, clips = AnswerMetrics(codec.metrics), Ledger(None), 0
    unknown_languages: Counter[str] = Counter()
    with out.open("w") if out else nullcontext() as file:
        for group in _groups(shards, limit, build.limits):
            items = [
                item if isinstance(item, SkippedSample) else build(item, domain, place)
                for place, item in group
            ]
            examples = [item for item in items if isinstance(item, Example)]
            ledger.record(
                (example.source for example in examples),
                [item for item in items if isinstance(item, SkippedSample)],
            )
            clips += len(examples)
            unknown_languages.update(
                example.target.unknown_language
                for example in examples
                if example.target.unknown_language
            )
            padded = module.encoder.padding == "30s"
            seconds = [WINDOW_SECONDS if padded else one.mel_length / 100 for one in examples]
            for batch in batches_by_seconds(seconds, batch_seconds):
                chosen = [examples[place] for place in batch]
                for entry in _answered(module, codec, chosen, max_new_tokens):
                    metrics.update(entry["task"], entry["generated"], entry["reference"])
                    if file:
                        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    figures = {name: float(value) for name, value in metrics.compute().items()}
    skipped = by_source(ledger.counts.skipped)
    return Evaluation(figures, clips, skipped, dict(unknown_languages))


def _groups(
    shards: Sequence[str], limit: int | None, limits: ClipLimits
) -> Iterator[list[tuple[int, Sample | SkippedSample]]]:
    """Yield groups of `(index, sample)`, with the sample's index in its folder."""
    for folder in shards:
        samples = enumerate(islice(iter_samples(open_index(folder), limits), limit))
        while group := list(islice(samples, CLIPS_AT_ONCE)):
            yield group


def _answered(
    module: AudioTextModule, codec: TextCodec, examples: Sequence[Example], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    batch = collate(examples, [], module.encoder.num_mel_bins).to(module.device)
    frames = module.encoder(batch.mel, batch.mel_lengths)
    answers = module.decoder.generate(
        frames.values, frames.lengths, batch.targets.prompts(), max_new_tokens
    )
    for example, tokens in zip(examples, answers, strict=True):
        facts = {"key": example.key, "domain": example.domain, "task": example.target.task}
        yield {**facts, "reference": example.target.text, "generated": codec.decode(tokens)}


def _codec_for(codec: TextCodec, tasks: Sequence[str]) -> TextCodec:
    if not tasks:
        return codec
    if not isinstance(codec, ChatText):
        raise UserError(
            f"The decoder of this run cannot be asked for {', '.join(tasks)}; "
            "runs with decoder=causal_lm can."
        )
    return replace(codec, instructions=codec.instructions.only(tasks))
