"""Annotation → tokens for Whisper's decoder, and tokens → text.

In: an `Annotation` and the domain of its source. Out: a `TokenTarget`: Whisper's prompt (start, language, task, no-timestamps), the
text, the end token. Next: `data.pack`. The prompt is what `WhisperTokenizer.prefix_tokens` builds; which language and task
token a domain gets is a setting.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.data.pack import TokenTarget
from whisper_aut.errors import Reason, SampleRefused

# Word and character error rate; equality after normalisation; overlap of lists; overlap of words with a caption.
Metric = Literal["words", "exact", "tags", "caption"]
TRANSCRIPTION, CAPTION = "transcription", "caption"
TRANSCRIPTION_TASKS = ("asr", TRANSCRIPTION)
LANGUAGE_CODES = frozenset(TO_LANGUAGE_CODE.values())
FALLBACK_LANGUAGE = "en"


@runtime_checkable
class TextCodec(Protocol):
    """A decoder's own way from a clip's annotation to tokens and back. It is pickled into the data workers."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What the texts of each task are measured by."""
        ...

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        """Return the tokens of one clip; a codec that draws something for it draws by its position in the order.

        Raises:
            SampleRefused: no text, or more tokens than the decoder takes.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of generated tokens, special tokens left out."""
        ...


@dataclass(frozen=True)
class DomainPrompt:
    """The prompt tokens of one domain: a Whisper task, and a language code or `sample` for what the sample itself says."""

    task: Literal["transcribe", "translate"] = "transcribe"
    language: str = "sample"


@dataclass
class WhisperText:
    """Tokens of the original Whisper decoder.

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

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {TRANSCRIPTION: "words", CAPTION: "caption"}

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        text = " ".join(annotation.text.split())
        if not text:
            raise SampleRefused(Reason.NO_TEXT)
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
        supervised[: 1 if self.supervise_prompt else len(prompt)] = False
        speech = annotation.task in TRANSCRIPTION_TASKS or (
            not annotation.task and domain == "speech"
        )
        return TokenTarget(
            torch.tensor(tokens),
            supervised,
            len(prompt),
            text,
            TRANSCRIPTION if speech else CAPTION,
        )

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def prompt_tokens(self, domain: str, sample_language: str) -> tuple[int, ...]:
        """Return start, language, task and no-timestamps for one clip."""
        if not self.multilingual:
            return _prefix(self.tokenizer, None, None)
        prompt = self.prompts.get(domain, DomainPrompt())
        language = sample_language if prompt.language == "sample" else prompt.language
        return _prefix(self.tokenizer, language_code(language), prompt.task)


def language_code(said: str) -> str:
    """Return Whisper's code for a code or an English name, in any case and with a region: `fr` for `fr-FR`, `fr_fr`, `French`.

    What Whisper has no language for becomes English, as the empty string does.
    """
    said = said.strip().lower().replace("_", "-")
    code = TO_LANGUAGE_CODE.get(said, said.partition("-")[0])
    return code if code in LANGUAGE_CODES else FALLBACK_LANGUAGE


@lru_cache(maxsize=512)
def _prefix(tokenizer: WhisperTokenizer, language: str | None, task: str | None) -> tuple[int, ...]:
    # Not `set_prefix_tokens`: it keeps the former language and task where it is given none.
    tokenizer.language, tokenizer.task, tokenizer.predict_timestamps = language, task, False
    return tuple(tokenizer.prefix_tokens)
