"""Text targets of the decoders: from a clip's annotation to tokens, and from tokens to text.

`WhisperText` writes sequences for Whisper's own decoder, and `ChatText` chats for a language model.
`choose_part` decides which part of a long clip, with which text, is used.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jinja2 import TemplateError
from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from whisper_aut.audio.decode import ROUNDING_SECONDS, SLACK_SECONDS, TRIM_SECONDS, LongClips
from whisper_aut.data.annotation import Annotation, Row, Template, language_name, whisper_codes
from whisper_aut.data.batch import TokenTarget
from whisper_aut.errors import SkipReason, SkipSample, UserError, nearest
from whisper_aut.schema import STRICT

# `words`: word and character error rate; `exact`: equality after normalisation; `tags`: overlap of
# lists; `caption`: overlap of words with a caption.
MetricName = Literal["words", "exact", "tags", "caption"]
TRANSCRIPTION, CAPTION = "transcription", "caption"
TRANSCRIPTION_TASKS = ("asr", TRANSCRIPTION)
DEFAULT_LANGUAGE = "en"  # for clips that state none
SAMPLE_LANGUAGE = "sample"
START, CAPTION_TOKEN = "<|startoftranscript|>", "<|startoflm|>"


def is_transcript(annotation: Annotation, domain: str) -> bool:
    """Return whether the text of a clip is what is said in it, from its beginning to its end."""
    task = annotation.task
    return task in TRANSCRIPTION_TASKS or (not task and domain == "speech")


@dataclass
class PartOfClip:
    """Chooses the part of a clip to decode, see `audio.decode.decode`.

    A clip of up to `TRIM_SECONDS` more than `max_seconds` loses its end. With `crop`, a longer one
    gives a window of `max_seconds`. Any other clip is kept as it is.

    Args:
        max_seconds: the limit on clips.
        crop: start of the window among all possible ones, from 0 (the first) to 1 (the last); None
            for no window.
        chunk: start and duration, in seconds, of the part to take in any case; None for none.

    Attributes:
        is_cut: whether the last clip was cut.
    """

    max_seconds: float
    crop: float | None = None
    chunk: tuple[float, float] | None = None
    is_cut: bool = False

    def __call__(self, seconds: float) -> tuple[float, float]:
        """Return start and duration of the part of a clip that lasts `seconds`."""
        if self.chunk:
            if (end := sum(self.chunk)) > seconds + SLACK_SECONDS:
                detail = f"segments up to {end:g} s of a clip that ends at {seconds:g} s"
                raise SkipSample(SkipReason.BAD_JSON, detail)
            self.is_cut = True
            return self.chunk
        spare = seconds - self.max_seconds
        is_long = spare > TRIM_SECONDS
        self.is_cut = spare > ROUNDING_SECONDS and (not is_long or self.crop is not None)
        if not self.is_cut:
            return 0.0, seconds
        return (self.crop or 0.0) * spare if is_long else 0.0, self.max_seconds


def choose_part(
    mode: LongClips, annotation: Annotation, domain: str, position: int, max_seconds: float
) -> tuple[Annotation, PartOfClip | None]:
    """Return which part of a clip to use if it is longer than `max_seconds`, and its annotation.

    Random draws are seeded with the clip's position in the order. A clip with a transcript is never
    cropped, because the transcript is about all of it.

    Args:
        mode: `trim`, `crop` and `chunk` trim clips that are a little too long, see `PartOfClip`.
            `crop` and `chunk` also take a window of longer ones. `chunk` takes consecutive segments
            of those that have some, see `Annotation.draw_chunk`. `skip` uses whole clips only.
        annotation, domain, position: those of the clip.
        max_seconds: the limit on clips.

    Raises:
        SkipSample: the clip has segments of an unknown form.
    """
    if mode == "skip":
        return annotation, None
    if mode == "chunk" and (drawn := annotation.draw_chunk(max_seconds, position)):
        annotation, chunk = drawn
        return annotation, PartOfClip(max_seconds, chunk=chunk)
    if mode == "trim" or is_transcript(annotation, domain):
        return annotation, PartOfClip(max_seconds)
    rng = random.Random(f"crop {position} {annotation.source} {annotation.id}")
    return annotation, PartOfClip(max_seconds, crop=rng.random())


@pydantic_dataclass(config=STRICT, frozen=True)
class LossSettings:
    """How the losses of the tokens of an optimizer step are averaged.

    Attributes:
        per: `token` gives all supervised tokens the same weight, `clip` all clips, so that long
            texts do not dominate.
        domains: a factor on the weight for each domain; 1 for those that are missing.
    """

    per: Literal["token", "clip"] = "token"
    domains: dict[str, PositiveFloat] = field(default_factory=dict)

    def weight(self, target: TokenTarget, domain: Any) -> float:
        """Return the weight of each supervised token of a clip."""
        tokens = max(1, int(target.supervised.sum())) if self.per == "clip" else 1
        return self.domains.get(domain, 1.0) / tokens


@runtime_checkable
class TextCodec(Protocol):
    """Converts annotations to the tokens of one decoder, and tokens to text.

    It is pickled to be sent to the data workers.
    """

    @property
    def metrics(self) -> Mapping[str, MetricName]:
        """The metric of each task."""
        ...

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        """Return the token target of one clip. Its position in the order seeds all random draws.

        A rank without clips runs on an annotation whose text, instruction, answer and label are all
        "a", so every codec must be able to encode that.

        Raises:
            SkipSample: there is no text, or more tokens than the decoder accepts.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of generated tokens, without special tokens."""
        ...


@dataclass(frozen=True)
class DomainPrompt:
    """The Whisper prompt of one domain.

    Attributes:
        task: `caption` uses `<|startoflm|>`, which is in every vocabulary but in no training text.
        language: any tag that `whisper_codes` understands, or `sample` for the language of each
            sample.
        text: words before the start token, as if they had been said before the clip.
    """

    task: Literal["transcribe", "translate", "caption"] = "transcribe"
    language: str = SAMPLE_LANGUAGE
    text: str = ""

    @property
    def special_tokens(self) -> list[str]:
        """The tokens that not every prompt needs."""
        return [CAPTION_TOKEN] * (self.task == "caption") + ["<|startofprev|>"] * bool(self.text)


@dataclass
class WhisperText:
    """Token sequences of the original Whisper decoder.

    A sequence consists of the prompt (words, if `DomainPrompt` has some, and the start, language,
    task and no-timestamps tokens), the text and the end token. Tokens are looked up in the
    checkpoint's own tokenizer, because checkpoints differ in the languages that they support. A
    clip that states no language gets the token for English; if the tokenizer has no token for a
    clip's language, the language token is left out.

    Args:
        tokenizer: a `WhisperTokenizer`, local or from the hub.
        prompts: prompt of each domain; domains that are missing use `DomainPrompt()`.
        max_tokens: maximum length of a sequence, including prompt and end token (448 in every
            Whisper).
        overflow: how to treat longer sequences: `cut` keeps the beginning, without an end token;
            `drop` skips the sample.
        supervise_prompt: domains in which the language, task and no-timestamps tokens are predicted
            too, as the Hugging Face recipe does; True for all.
        multilingual: whether the checkpoint uses language and task tokens; English-only ones don't.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Mapping[str, DomainPrompt] = field(default_factory=dict)
    max_tokens: int = 448
    overflow: Literal["cut", "drop"] = "cut"
    supervise_prompt: bool | Sequence[str] = True
    multilingual: bool = True
    vocabulary: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.vocabulary = self.tokenizer.get_vocab()

    @property
    def metrics(self) -> Mapping[str, MetricName]:
        return {TRANSCRIPTION: "words", CAPTION: "caption"}

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        text = " ".join(annotation.text.split())
        if not text:
            raise SkipSample(SkipReason.NO_TEXT, annotation.missing_text_hint())
        prompt = self.prompt_tokens(domain, annotation.language)
        tokens = [*prompt, *_plain_tokens(self.tokenizer, text), self.tokenizer.eos_token_id]
        tokens = _limit_tokens(tokens, self.max_tokens, drop=self.overflow == "drop")
        language = self._language(domain, annotation.language)
        is_unknown = self.multilingual and not self.language_token(language)
        supervised = torch.ones(len(tokens), dtype=torch.bool)
        start = prompt.index(self.vocabulary[START]) + 1
        # A prompt without a language token is not supervised. Otherwise the model would learn to
        # leave the token out for languages that have one.
        chosen = self.supervise_prompt
        predicts_prompt = chosen if isinstance(chosen, bool) else domain in chosen
        predicts_prompt = predicts_prompt and not is_unknown
        supervised[: start if predicts_prompt else len(prompt)] = False
        return TokenTarget(
            torch.tensor(tokens),
            supervised,
            len(prompt),
            text,
            TRANSCRIPTION if is_transcript(annotation, domain) else CAPTION,
            unknown_language=language if is_unknown else "",
        )

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def prompt_tokens(self, domain: str, sample_language: str) -> tuple[int, ...]:
        """Return the prompt of a clip: words, start, language, task and no-timestamps tokens.

        English-only checkpoints have no language and task tokens. `sample_language` is the language
        that the sample states; it may be empty.
        """
        names, words = [START], []
        prompt = self._prompt(domain)
        if self.multilingual:
            language = self.language_token(self._language(domain, sample_language))
            names += [language] if language else []
        if prompt.task == "caption":
            names.append(CAPTION_TOKEN)
        elif self.multilingual:
            names.append(f"<|{prompt.task}|>")
        if prompt.text.strip():  # in the form of `WhisperTokenizer.get_prompt_ids`
            words = _plain_tokens(self.tokenizer, f" {prompt.text.strip()}")
            words = [self.vocabulary["<|startofprev|>"], *words]
        return (*words, *(self.vocabulary[name] for name in [*names, "<|notimestamps|>"]))

    def language_token(self, tag: str) -> str | None:
        """Return the token of a language or of its macrolanguage; None if there is neither."""
        tokens = (f"<|{code}|>" for code in whisper_codes(tag))
        return next((token for token in tokens if token in self.vocabulary), None)

    def _language(self, domain: str, sample_language: str) -> str:
        language = self._prompt(domain).language
        stated = sample_language if language == SAMPLE_LANGUAGE else language
        return stated.strip() or DEFAULT_LANGUAGE

    def _prompt(self, domain: str) -> DomainPrompt:
        return self.prompts.get(domain, DomainPrompt())


def missing_token_warning(clips: Mapping[str, int]) -> str:
    """Return a warning about clips whose language has no token, given their number by language."""
    listed = ", ".join(f"{tag!r}: {n}" for tag, n in Counter(clips).most_common(10))
    more = ", …" if len(clips) > 10 else ""
    return (
        f"{sum(clips.values())} clips have a language for which this Whisper has no token "
        f"({listed}{more}); their sequences have no language token. Correct their `language` where "
        "it is wrong."
    )


def _plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # `split_special_tokens`: a caption that spells "<|endoftext|>" is plain text.
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def _limit_tokens(tokens: list[int], max_tokens: int, *, drop: bool) -> list[int]:
    if drop and len(tokens) > max_tokens:
        detail = f"{len(tokens)} tokens, limit {max_tokens}"
        raise SkipSample(SkipReason.LABEL_TOO_LONG, detail)
    return tokens[:max_tokens]


OWN_TASK = "question"  # task of samples that come with their own instruction and answer
CANDIDATE = "candidate"


@dataclass
class Instruction:
    """One task of `conf/instructions`.

    Prompts and answers are templates over an annotation's fields (`annotation.Template`).

    Attributes:
        prompts: paraphrases of the instruction.
        answer: template of the answer. The task is not used for samples that lack one of its
            fields.
        tasks: values of a sample's `task` that the task accepts, in addition to its own name; empty
            for any.
        domains: domains that the task accepts; empty for any.
        weight: weight among the tasks that fit a sample.
        metric: metric of the generated answers.
        others: labels for the answer "no". If given, this is a yes/no task: `{candidate}` in
            `prompts` is a label from the filled `answer` (yes), or one of these (no).
    """

    prompts: list[str]
    answer: str = "{text}"
    tasks: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    weight: float = 1.0
    metric: MetricName = "exact"
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """The task name, the instruction and the answer of one clip."""

    task: str
    prompt: str
    answer: str


class Instructions:
    """The instruction tasks of a run, by name.

    Raises:
        UserError: there is no task, or some are invalid; the message lists all problems.
    """

    def __init__(self, entries: Mapping[str, Instruction]):
        problems = [one for name, entry in entries.items() for one in _problems(name, entry)]
        if not entries:
            problems.append("there is no task at all")
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise UserError(f"Instructions that cannot be used:\n{listed}")
        self.entries = dict(entries)
        self._answers = {name: Template(entry.answer) for name, entry in entries.items()}
        self._prompts = {
            name: [Template(prompt) for prompt in entry.prompts] for name, entry in entries.items()
        }

    @property
    def metrics(self) -> dict[str, MetricName]:
        """The metric of each task."""
        return {OWN_TASK: "caption", **{name: entry.metric for name, entry in self.entries.items()}}

    def only(self, names: Iterable[str]) -> "Instructions":
        """Return a copy with these tasks only. A single task is asked about every clip that has
        the fields of its answer, whatever the clip's own `task`.

        Raises:
            UserError: there is no task of that name.
        """
        names = list(names)
        for name in names:
            if name not in self.entries:
                known = ", ".join(sorted(self.entries))
                raise UserError(
                    f"There is no task {name!r}.{nearest(name, self.entries)} "
                    f"Tasks of this run: {known}."
                )
        chosen = {name: self.entries[name] for name in names}
        if len(chosen) == 1:
            chosen = {name: replace(entry, tasks=[]) for name, entry in chosen.items()}
        return Instructions(chosen)

    def answers(self, annotation: Annotation, domain: str) -> dict[str, str]:
        """Return the answer to each task that fits a sample; for a yes/no task, its true labels."""
        row = _template_fields(annotation)
        prompt_row = {**row, CANDIDATE: "any"}
        answers = {}
        for name, entry in self.entries.items():
            is_accepted = (not entry.tasks or annotation.task in (name, *entry.tasks)) and (
                not entry.domains or domain in entry.domains
            )
            answer = self._answers[name].fill(row) if is_accepted and entry.weight else ""
            if answer and all(prompt.fill(prompt_row) for prompt in self._prompts[name]):
                answers[name] = answer
        return answers

    def draw(self, annotation: Annotation, domain: str, position: int) -> Question:
        """Draw a task and a paraphrase for one sample; its position in the order seeds the draw.

        If the sample has its own instruction and answer, those are used unchanged.

        Raises:
            SkipSample: no task fits.
        """
        if annotation.instruction.strip() and annotation.answer.strip():
            return Question(OWN_TASK, annotation.instruction.strip(), annotation.answer.strip())
        row, answers = _template_fields(annotation), self.answers(annotation, domain)
        if not answers:
            has = ", ".join(name for name, value in row.items() if value) or "nothing"
            detail = f"task {annotation.task!r}, domain {domain!r}, has {has}"
            raise SkipSample(SkipReason.NO_TASK, detail)
        # Seeded with a string: unlike `hash`, it gives the same result in every process.
        rng = random.Random(f"{position} {annotation.source} {annotation.id}")
        names = list(answers)
        name = rng.choices(names, [self.entries[name].weight for name in names])[0]
        prompt, answer = rng.choice(self._prompts[name]), answers[name]
        if others := self.entries[name].others:
            row[CANDIDATE], answer = _draw_candidate(answer, others, rng)
        return Question(name, prompt.fill(row), answer)


def _template_fields(annotation: Annotation) -> Row:
    """Return the fields that templates may use; a list of labels is sorted and deduplicated."""
    label = annotation.label
    return {
        **annotation.extra,
        "text": " ".join(annotation.text.split()),
        "label": sorted(set(label)) if isinstance(label, list) else label,
        "language": annotation.language,
        "language_name": language_name(annotation.language),
        "instruction": annotation.instruction,
        "answer": annotation.answer,
    }


def _draw_candidate(labels: str, others: list[str], rng: random.Random) -> tuple[str, str]:
    """Return the candidate of a yes/no question, and its answer.

    For "yes", the candidate is one of the clip's labels. For "no", it is one of `others` that
    shares no word with the labels: "waves" would be true of a clip labelled "sea waves".
    """
    label_words = _words(labels)
    false = [other for other in others if not _words(other) & label_words]
    if not false or rng.random() < 0.5:
        return rng.choice([label.strip() for label in labels.split(",")]), "yes"
    return rng.choice(false), "no"


def _words(label: str) -> set[str]:
    """Return the words of a label in lower case, without the `s` of a plural."""
    words = re.findall(r"[^\W_]+", label.lower())
    return {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words}


def _problems(name: str, entry: Instruction) -> Iterator[str]:
    if not entry.prompts:
        yield f"{name}.prompts: give at least one instruction"
    templates = [("answer", entry.answer), *(("prompts", prompt) for prompt in entry.prompts)]
    for key, text in templates:
        template = Template(text)
        if template.fault:
            yield f"{name}.{key}: {text!r}: {template.fault}"
        elif not text.strip():
            yield f"{name}.{key}: empty"
    uses_candidate = any(CANDIDATE in Template(prompt).columns for prompt in entry.prompts)
    if uses_candidate != bool(entry.others):
        yield f"{name}: a yes/no task has both {{{CANDIDATE}}} in `prompts` and a list of `others`"
    if entry.weight < 0:
        yield f"{name}.weight: {entry.weight} is negative"


AUDIO = -1  # placeholder for the frames of a clip; no vocabulary has this id
# Markers that are rendered into the chat template to find where the parts of a message go. No
# template or instruction contains them.
_AUDIO_MARK, _PROMPT_MARK, _ANSWER_MARK = "\x02audio\x03", "\x02prompt\x03", "\x02answer\x03"
# Templates write today's date with this function of transformers, which cannot be replaced by an
# argument of `apply_chat_template`.
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class ChatFrame:
    """The fixed tokens of a chat."""

    opening: tuple[int, ...]  # before the audio
    between: tuple[int, ...]  # between the audio and the instruction
    closing: tuple[int, ...]  # between the instruction and the answer
    end: int  # ends the answer

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, date: str = "") -> "ChatFrame":
        """Read the frame from a tokenizer's chat template.

        Thinking is turned off if the template supports that. `date` is a day (`2026-11-28`) that
        replaces today's date in templates that write it.

        Raises:
            UserError: there is no chat template, it fails or drops the message, or the date is
                invalid.
        """
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise UserError(
                f"{name} has no chat template; pick a language model that was trained to chat."
            )
        question = [{"role": "user", "content": f"{_AUDIO_MARK}\n{_PROMPT_MARK}"}]
        chat = [*question, {"role": "assistant", "content": _ANSWER_MARK}]
        options: dict[str, Any] = {
            "tokenize": False,
            "enable_thinking": False,
            "chat_template": _dated_template(tokenizer, date),
        }
        try:
            prompt = str(
                tokenizer.apply_chat_template(question, add_generation_prompt=True, **options)
            )
            whole = str(tokenizer.apply_chat_template(chat, **options))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"The chat template of {name} fails on a user's message and an answer to it: "
                f"{error}. Pick another language model, or fix its chat_template.jinja."
            ) from None
        if _AUDIO_MARK not in prompt or _PROMPT_MARK not in prompt or _ANSWER_MARK not in whole:
            raise UserError(f"The chat template of {name} leaves out the given messages.")
        opening, _, rest = prompt.partition(_AUDIO_MARK)
        between, _, closing = rest.partition(_PROMPT_MARK)
        after_answer = _template_tokens(tokenizer, whole.partition(_ANSWER_MARK)[2])
        special = set(tokenizer.all_special_ids)
        special |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        end = next((id for id in after_answer if id in special), tokenizer.eos_token_id)
        if not isinstance(end, int):
            raise UserError(
                f"Neither the chat template of {name} nor its tokenizer has a token that ends an "
                "answer."
            )
        return cls(
            _template_tokens(tokenizer, opening),
            _template_tokens(tokenizer, between),
            _template_tokens(tokenizer, closing),
            end,
        )


def _template_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _dated_template(tokenizer: PreTrainedTokenizerBase, date: str) -> str:
    """Return the chat template with a fixed date in place of calls that return today's."""
    try:
        day = datetime.fromisoformat(date) if date else datetime.now()
    except ValueError:
        raise UserError(f"decoder.date: {date!r} is not a day such as 2026-11-28.") from None
    template = _DATE_CALL.sub(
        lambda call: json.dumps(day.strftime(call["format"])), tokenizer.get_chat_template()
    )
    if "strftime_now(" in template:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} computes the format of today's date, "
            "so its prompts would change from day to day. "
            "Write a fixed date in its chat_template.jinja."
        )
    return template


@dataclass
class ChatText:
    """Token sequences of a chat with a language model about a clip.

    Args:
        tokenizer: tokenizer of the language model.
        instructions: the tasks.
        max_tokens: maximum length of a sequence, including the template and the end token.
        overflow: how to treat longer sequences: `cut` keeps the beginning, without an end token;
            `drop` skips the sample. Samples whose prompt alone is too long are always skipped.
        date: see `ChatFrame.from_tokenizer`.
    """

    tokenizer: PreTrainedTokenizerBase
    instructions: Instructions
    max_tokens: int = 512
    overflow: Literal["cut", "drop"] = "cut"
    date: str = ""
    frame: ChatFrame = field(init=False)

    def __post_init__(self) -> None:
        self.frame = ChatFrame.from_tokenizer(self.tokenizer, self.date)

    @property
    def metrics(self) -> Mapping[str, MetricName]:
        return self.instructions.metrics

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        question = self.instructions.draw(annotation, domain, position)
        prompt = self._prompt_tokens(question.prompt)
        tokens = [*prompt, *_plain_tokens(self.tokenizer, question.answer), self.frame.end]
        drop = self.overflow == "drop" or len(prompt) >= self.max_tokens
        tokens = _limit_tokens(tokens, self.max_tokens, drop=drop)
        supervised = torch.zeros(len(tokens), dtype=torch.bool)
        supervised[len(prompt) :] = True
        return TokenTarget(
            torch.tensor(tokens), supervised, len(prompt), question.answer, question.task
        )

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def encode_question(self, question: str) -> Tensor:
        """Return the prompt of a question about a clip, `[L]`, for generation."""
        return torch.tensor(self._prompt_tokens(question))

    def _prompt_tokens(self, prompt: str) -> list[int]:
        frame = self.frame
        prompt_tokens = _plain_tokens(self.tokenizer, prompt)
        return [*frame.opening, AUDIO, *frame.between, *prompt_tokens, *frame.closing]
