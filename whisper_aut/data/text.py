"""Annotation → tokens for Whisper's decoder, and tokens → text.

In: an `Annotation` and the domain of its source. Out: a `TokenTarget`: Whisper's prompt (start, language, task, no-timestamps), the
text, the end token. Next: `data.pack`. Which language and task a domain gets is a setting; their tokens are looked up in the
checkpoint's own tokenizer, as checkpoints differ in the languages that they have.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.languages import whisper_codes
from whisper_aut.data.pack import TokenTarget
from whisper_aut.errors import Reason, SampleRefused

# Word and character error rate; equality after normalisation; overlap of lists; overlap of words with a caption.
Metric = Literal["words", "exact", "tags", "caption"]
TRANSCRIPTION, CAPTION = "transcription", "caption"
TRANSCRIPTION_TASKS = ("asr", TRANSCRIPTION)
DEFAULT_LANGUAGE = "en"  # of clips that state none
OF_THE_SAMPLE = "sample"


@runtime_checkable
class TextCodec(Protocol):
    """A decoder's own way from a clip's annotation to tokens and back. It is pickled into the data workers."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What the texts of each task are measured by."""
        ...

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        """Return the tokens of one clip; a codec that draws something for it draws by its position in the order.

        A rank without clips runs on the text "a" (which is also instruction, answer and label), so
        that must be encoded.

        Raises:
            SampleRefused: no text, or more tokens than the decoder takes.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of generated tokens, special tokens left out."""
        ...


@dataclass(frozen=True)
class DomainPrompt:
    """The prompt tokens of one domain: a Whisper task, and a language (any tag that `corpora.languages` reads) or `sample` for
    what the sample itself says."""

    task: Literal["transcribe", "translate"] = "transcribe"
    language: str = OF_THE_SAMPLE


@dataclass
class WhisperText:
    """Tokens of the original Whisper decoder.

    A clip without a language opens as English. One whose language the tokenizer has no token for opens without a language token.

    Args:
        tokenizer: a `WhisperTokenizer`, local or from the hub.
        prompts: the prompt of each domain; a domain that is missing gets the default one.
        max_tokens: the longest sequence that the decoder takes, prompt and end token included (448 in every Whisper).
        overflow: what happens to a longer one: `cut` keeps its beginning and no end token, `drop` refuses the sample.
        supervise_prompt: also predict the language, task and no-timestamps tokens, as the Hugging Face recipe does.
        multilingual: whether the checkpoint knows language and task tokens; English-only ones don't.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Mapping[str, DomainPrompt] = field(default_factory=dict)
    max_tokens: int = 448
    overflow: Literal["cut", "drop"] = "cut"
    supervise_prompt: bool = True
    multilingual: bool = True
    vocabulary: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.vocabulary = self.tokenizer.get_vocab()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {TRANSCRIPTION: "words", CAPTION: "caption"}

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        text = " ".join(annotation.text.split())
        if not text:
            raise SampleRefused(Reason.NO_TEXT, annotation.without_text())
        prompt = self.prompt_tokens(domain, annotation.language)
        # `split_special_tokens`: a caption that spells "<|endoftext|>" is text, not an instruction to the decoder.
        answer = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        tokens = [*prompt, *answer, self.tokenizer.eos_token_id]
        if len(tokens) > self.max_tokens:
            if self.overflow == "drop":
                raise SampleRefused(
                    Reason.LABEL_TOO_LONG, f"{len(tokens)} tokens, limit {self.max_tokens}"
                )
            tokens = tokens[: self.max_tokens]
        supervised = torch.ones(len(tokens), dtype=torch.bool)
        unknown_language = self._unknown_language(domain, annotation.language)
        # A prompt that lacks its language is given and not learned: a language must not be skipped where it is known.
        learns_prompt = self.supervise_prompt and not unknown_language
        supervised[: 1 if learns_prompt else len(prompt)] = False
        speech = annotation.task in TRANSCRIPTION_TASKS or (
            not annotation.task and domain == "speech"
        )
        return TokenTarget(
            torch.tensor(tokens),
            supervised,
            len(prompt),
            text,
            TRANSCRIPTION if speech else CAPTION,
            unknown_language=unknown_language,
        )

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def prompt_tokens(self, domain: str, sample_language: str) -> tuple[int, ...]:
        """Return start, language, task and no-timestamps for one clip: those of them that the checkpoint has."""
        names = ["<|startoftranscript|>"]
        if self.multilingual:
            language = self.language_token(self._language(domain, sample_language))
            names += [*([language] if language else []), f"<|{self._prompt(domain).task}|>"]
        return tuple(self.vocabulary[name] for name in [*names, "<|notimestamps|>"])

    def language_token(self, tag: str) -> str | None:
        """Return the token that the checkpoint has for a language, or for the macrolanguage that it belongs to."""
        tokens = (f"<|{code}|>" for code in whisper_codes(tag))
        return next((token for token in tokens if token in self.vocabulary), None)

    def _unknown_language(self, domain: str, sample_language: str) -> str:
        """Return the language of a clip where it has no token, else nothing."""
        language = self._language(domain, sample_language)
        return "" if not self.multilingual or self.language_token(language) else language

    def _language(self, domain: str, sample_language: str) -> str:
        language = self._prompt(domain).language
        stated = sample_language if language == OF_THE_SAMPLE else language
        return stated.strip() or DEFAULT_LANGUAGE

    def _prompt(self, domain: str) -> DomainPrompt:
        return self.prompts.get(domain, DomainPrompt())


def without_language_token(clips: Mapping[str, int]) -> str:
    """Say how many clips have a language for which the decoder has no token, given their numbers by language."""
    listed = ", ".join(f"{tag!r}: {n}" for tag, n in Counter(clips).most_common(10))
    more = ", …" if len(clips) > 10 else ""
    return (
        f"{sum(clips.values())} clips have a language for which this Whisper has no token ({listed}{more}); their texts open without "
        "a language token. Correct their `language` where it is a mistake."
    )
