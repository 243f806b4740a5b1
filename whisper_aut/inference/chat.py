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
from typing import Any

import torch

from whisper_aut.audio.decode import ClipLimits, LongClips, load_file
from whisper_aut.audio.logmel import WINDOW_SECONDS, LogMel, mel_frames
from whisper_aut.audio.windows import BATCH_SECONDS, batches_by_seconds
from whisper_aut.data.batch import Example, TokenTarget, collate
from whisper_aut.data.dataset import ExampleBuilder, Ledger, by_source
from whisper_aut.data.reader import SkippedSample
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.data.targets import DEFAULT_LANGUAGE, ChatText, TextCodec
from whisper_aut.errors import SkipReason, SkipSample, UserError
from whisper_aut.models.metrics import AnswerMetrics
from whisper_aut.models.module import AudioTextModule

CLIPS_AT_ONCE = 16


def takes_questions(codec: TextCodec) -> bool:
    """Return whether the decoder of a codec can be asked a question in words."""
    return hasattr(codec, "encode_question")


def answer(module: AudioTextModule, audio: Path, question: str, *, max_new_tokens: int = 64) -> str:
    """Answer a question about an audio file.

    Raises:
        UserError: the file cannot be used, or the decoder takes no questions.
    """
    if not takes_questions(module.codec):
        raise UserError("The run's decoder takes no questions; runs with decoder=causal_lm do.")
    (text,) = _generate(module, audio, question, [max_new_tokens])
    return text


def stream(
    module: AudioTextModule, audio: Path, prompt: str, *, max_new_tokens: int = 64
) -> Iterator[str]:
    """Yield the text for an audio file while it grows; the last one is complete.

    The first one has 4 tokens, and each next one twice as many, generated again from the start. The
    `prompt` is a question if the decoder takes questions, otherwise a domain.
    """
    counts = [4 << step for step in range(10) if 4 << step < max_new_tokens]
    return _generate(module, audio, prompt, [*counts, max_new_tokens])


@torch.inference_mode()
def _generate(
    module: AudioTextModule, audio: Path, prompt: str, token_counts: Sequence[int]
) -> Iterator[str]:
    """Yield the text cut to each of some numbers of tokens, until it is complete."""
    try:
        waveform = load_file(audio, ClipLimits())
    except SkipSample as skip:
        if skip.reason is SkipReason.MISSING_FILE:
            raise UserError(f"Cannot read {audio}: {skip.detail}.") from None
        raise UserError(f"{audio} cannot be used: {skip}.") from None
    codec: Any = module.codec
    if takes_questions(codec):
        tokens = codec.encode_question(prompt)
    else:
        tokens = torch.tensor(codec.prompt_tokens(prompt, DEFAULT_LANGUAGE))
    bins, target = module.encoder.num_mel_bins, TokenTarget(tokens, tokens > 0, len(tokens))
    clip = Example(LogMel(bins)(waveform), mel_frames(len(waveform)), target, "", "", "")
    frames = module.encode(collate([clip], [], bins).to(module.device))
    for count in token_counts:
        (written,) = module.decoder.generate(frames.values, frames.lengths, [tokens], count)
        yield module.codec.decode(written)
        if len(written) < count:
            return


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    `metrics` are by name, such as `exact_sound_class`. `cut` counts texts that reached
    `max_new_tokens`, `skipped` skipped clips by source and reason, and `unknown_languages` clips by
    language, for languages without a token.
    """

    metrics: dict[str, float]
    clips: int
    cut: int
    skipped: dict[str, dict[str, int]]
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
    long_clips: LongClips = "trim",
    out: Path | None = None,
    max_new_tokens: int = 256,
) -> Evaluation:
    """Generate a text for every clip of some shards, and score it with its task's metrics.

    Args:
        shards: folders or URLs of shards.
        tasks: the tasks to choose from. By default one of all tasks is drawn for each clip, as in
            training.
        domain: the domain of clips whose annotation does not state one.
        limit: use only this many clips of each folder, from its start.
        batch_seconds: seconds of audio in a batch, padding included.
        long_clips: what to do with clips above 30 s, see `targets.choose_part`.
        out: a JSON-lines file for the key, domain, task, reference and answer of each clip.

    Raises:
        UserError: a task or the shards do not exist, or tasks are given for a decoder that takes
            no questions.
    """
    codec = _select_tasks(module.codec, tasks)
    build = ExampleBuilder(
        LogMel(module.encoder.num_mel_bins), codec, ClipLimits(), long_clips=long_clips
    )
    metrics, ledger, clips, cut = AnswerMetrics(codec.metrics), Ledger(None), 0, 0
    unknown_languages: Counter[str] = Counter()
    # Names in tars may not be UTF-8.
    text: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
    with out.open("w", **text) if out else nullcontext() as file:
        for folder in shards:
            samples = enumerate(islice(iter_samples(open_index(folder), build.limits), limit))
            while group := list(islice(samples, CLIPS_AT_ONCE)):
                items = [
                    item if isinstance(item, SkippedSample) else build(item, domain, position)
                    for position, item in group
                ]
                examples = [item for item in items if isinstance(item, Example)]
                skipped = [item for item in items if isinstance(item, SkippedSample)]
                ledger.record((example.source for example in examples), skipped)
                clips += len(examples)
                languages = (example.target.unknown_language for example in examples)
                unknown_languages.update(language for language in languages if language)
                for entry in _answers(module, codec, examples, batch_seconds, max_new_tokens):
                    cut += entry.pop("tokens") == max_new_tokens
                    references = entry.pop("references")
                    metrics.update(entry["task"], entry["generated"], references)
                    if file:
                        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    computed = {
        f"{name}_{task}": float(value)
        for task, values in metrics.compute().items()
        for name, value in values.items()
    }
    skipped = by_source(ledger.counts.skipped)
    return Evaluation(computed, clips, cut, skipped, dict(unknown_languages))


def _answers(
    module: AudioTextModule,
    codec: TextCodec,
    examples: Sequence[Example],
    batch_seconds: float,
    max_new_tokens: int,
) -> Iterator[dict[str, Any]]:
    padded = module.encoder.padding == "30s"
    seconds = [WINDOW_SECONDS if padded else example.mel_length / 100 for example in examples]
    for indices in batches_by_seconds(seconds, batch_seconds):
        chosen = [examples[index] for index in indices]
        batch = collate(chosen, [], module.encoder.num_mel_bins).to(module.device)
        frames = module.encode(batch)
        answers = module.decoder.generate(
            frames.values, frames.lengths, batch.targets.prompts(), max_new_tokens
        )
        for example, tokens in zip(chosen, answers, strict=True):
            yield {
                "key": example.key,
                "domain": example.domain,
                "task": example.target.task,
                "reference": example.target.text,
                "references": example.target.references or (example.target.text,),
                "generated": codec.decode(tokens),
                "tokens": len(tokens),
            }


def _select_tasks(codec: TextCodec, tasks: Sequence[str]) -> TextCodec:
    if not tasks:
        return codec
    if not isinstance(codec, ChatText):
        raise UserError(
            f"The decoder of this run has no tasks such as {', '.join(tasks)}; runs with "
            "decoder=causal_lm do."
        )
    return replace(codec, instructions=codec.instructions.only(tasks))
