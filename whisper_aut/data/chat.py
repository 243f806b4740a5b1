"""Annotation → tokens of a chat with a language model, with a place for the audio.

In: an annotation. Out: a `TokenTarget`: the model's own chat template around audio and instruction, the answer, the end token; only the
latter two are supervised. Next: `data.pack`, then `model.decoders.causal_lm` puts audio frames where `AUDIO` stands.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.data.pack import TokenTarget
from whisper_aut.data.prompts import Instructions
from whisper_aut.data.text import Metric
from whisper_aut.errors import Reason, SampleRefused, UserError

AUDIO = -1  # stands where a clip's frames go; no vocabulary has this id
# Places in the template, found again in its text; no template or instruction holds these.
_AUDIO_MARK, _ASK_MARK, _ANSWER_MARK = "\x02audio\x03", "\x02ask\x03", "\x02answer\x03"
# How templates write today's date: a function of transformers' that no argument of a rendering replaces.
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class ChatFrame:
    """The fixed tokens of a chat: before the audio, between audio and instruction, before the answer, and the end token."""

    opening: tuple[int, ...]
    between: tuple[int, ...]
    closing: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, date: str = "") -> "ChatFrame":
        """Read a tokenizer's chat template, with thinking off where it knows of that.

        Args:
            date: the day (`2026-11-28`) that a template which writes today's date writes instead; empty for today.

        Raises:
            UserError: no chat template, one that raises or loses the message, or a wrong date.
        """
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise UserError(
                f"{name} has no chat template; pick a language model that was trained to chat."
            )
        asked = [{"role": "user", "content": f"{_AUDIO_MARK}\n{_ASK_MARK}"}]
        answered = [*asked, {"role": "assistant", "content": _ANSWER_MARK}]
        options: dict[str, Any] = {
            "tokenize": False,
            "enable_thinking": False,
            "chat_template": _dated(tokenizer, date),
        }
        try:
            prompt = str(
                tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
            )
            whole = str(tokenizer.apply_chat_template(answered, **options))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"The chat template of {name} fails on a user's message and an answer to it: {error}. "
                "Pick another language model, or mend its chat_template.jinja."
            ) from None
        if _AUDIO_MARK not in prompt or _ASK_MARK not in prompt or _ANSWER_MARK not in whole:
            raise UserError(f"The chat template of {name} does not repeat what it is given.")
        opening, _, rest = prompt.partition(_AUDIO_MARK)
        between, _, closing = rest.partition(_ASK_MARK)
        return cls(
            _ids(tokenizer, opening),
            _ids(tokenizer, between),
            _ids(tokenizer, closing),
            _end_token(tokenizer, whole.partition(_ANSWER_MARK)[2]),
        )


@dataclass
class ChatText:
    """Tokens of a language model's chat.

    Args:
        tokenizer: the language model's.
        instructions: what is asked.
        max_tokens: the longest sequence of text tokens, template and end token included.
        overflow: what happens to a longer one: `cut` keeps its beginning and no end token, `drop` refuses the sample.
        date: see `ChatFrame.of`.
    """

    tokenizer: PreTrainedTokenizerBase
    instructions: Instructions
    max_tokens: int = 512
    overflow: Literal["cut", "drop"] = "cut"
    date: str = ""
    frame: ChatFrame = field(init=False)

    def __post_init__(self) -> None:
        self.frame = ChatFrame.of(self.tokenizer, self.date)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return self.instructions.metrics

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        question = self.instructions.draw(annotation, domain, position)
        prompt = self._prompt(question.ask)
        tokens = [*prompt, *self._text(question.answer), self.frame.end]
        if len(tokens) > self.max_tokens:
            if self.overflow == "drop" or len(prompt) >= self.max_tokens:
                raise SampleRefused(
                    Reason.LABEL_TOO_LONG, f"{len(tokens)} tokens, limit {self.max_tokens}"
                )
            tokens = tokens[: self.max_tokens]
        supervised = torch.zeros(len(tokens), dtype=torch.bool)
        supervised[len(prompt) :] = True
        return TokenTarget(
            torch.tensor(tokens), supervised, len(prompt), question.answer, question.task
        )

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def ask(self, question: str) -> Tensor:
        """Return the prompt of a question about a clip, `[L]`, ready for generation."""
        return torch.tensor(self._prompt(question))

    def _prompt(self, ask: str) -> list[int]:
        return [
            *self.frame.opening,
            AUDIO,
            *self.frame.between,
            *self._text(ask),
            *self.frame.closing,
        ]

    def _text(self, text: str) -> list[int]:
        # `split_special_tokens`: a caption that spells "<|im_end|>" is text, not an instruction to the model.
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _end_token(tokenizer: PreTrainedTokenizerBase, after: str) -> int:
    """Return the token that ends an answer: the first special one that the template writes after it, else eos."""
    special = set(tokenizer.all_special_ids)
    special |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((id for id in _ids(tokenizer, after) if id in special), tokenizer.eos_token_id)
    if not isinstance(end, int):
        raise UserError(
            f"Neither the chat template of {tokenizer.name_or_path} nor its tokenizer has a token that ends an answer."
        )
    return end


def _dated(tokenizer: PreTrainedTokenizerBase, date: str) -> str:
    """Return the chat template with the date written into it where it asks for today's."""
    try:
        day = datetime.fromisoformat(date) if date else datetime.now()
    except ValueError:
        raise UserError(f"decoder.date: {date!r} is not a day such as 2026-11-28.") from None
    template = _DATE_CALL.sub(
        lambda call: json.dumps(day.strftime(call["format"])), tokenizer.get_chat_template()
    )
    if "strftime_now(" in template:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} computes the format of today's date, so its prompts would change from "
            "day to day. Write a fixed date in its chat_template.jinja."
        )
    return template
