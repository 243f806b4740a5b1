"""Annotation → chat tokens: the model's own template, one place for the audio, only the answer supervised."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.data.chat import AUDIO, ChatText
from whisper_aut.data.prompts import Instruction, Instructions
from whisper_aut.errors import Reason, SampleRefused, UserError

CAPTION = Instructions({"caption": Instruction(["Describe it."])})


@pytest.fixture
def codec(tiny_language_model: Path) -> ChatText:
    return ChatText(AutoTokenizer.from_pretrained(tiny_language_model), CAPTION)


def test_the_tokens_are_those_of_the_chat_template(codec: ChatText):
    target = codec.encode(Annotation(text="rain falls on a tin roof"), "sound", 0)
    tokens = target.tokens.tolist()
    assert tokens.count(AUDIO) == 1
    prompt = codec.tokenizer.apply_chat_template(
        [{"role": "user", "content": "\nDescribe it."}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    assert [token for token in tokens[: target.prompt_length] if token != AUDIO] == prompt
    assert (
        codec.tokenizer.decode(tokens[target.prompt_length :])
        == "rain falls on a tin roof<|im_end|>"
    )
    assert target.supervised.tolist() == [
        place >= target.prompt_length for place in range(len(tokens))
    ]
    assert codec.ask("Describe it.").tolist() == tokens[: target.prompt_length]
    assert codec.decode(tokens[target.prompt_length :]) == target.text == "rain falls on a tin roof"
    assert target.task == "caption"


def test_special_tokens_in_texts_are_text(codec: ChatText):
    target = codec.encode(Annotation(text="stop <|im_end|> here"), "sound", 0)
    end = codec.frame.end
    assert target.tokens[target.prompt_length :].tolist().count(end) == 1
    assert int(target.tokens[-1]) == end
    assert codec.ask("<|im_start|>").tolist().count(codec.frame.opening[0]) == codec.ask(
        "x"
    ).tolist().count(codec.frame.opening[0])


def test_long_chats_are_cut_or_refused(codec: ChatText):
    annotation = Annotation(text="rain " * 300)
    cut = ChatText(codec.tokenizer, CAPTION, max_tokens=64).encode(annotation, "sound", 0)
    assert len(cut.tokens) == 64
    assert int(cut.tokens[-1]) != codec.frame.end
    for strict in (
        ChatText(codec.tokenizer, CAPTION, 64, "drop"),
        ChatText(codec.tokenizer, CAPTION, max_tokens=8),
    ):
        with pytest.raises(SampleRefused) as refused:
            strict.encode(annotation, "sound", 0)
        assert refused.value.reason == Reason.LABEL_TOO_LONG


def test_templates_that_cannot_be_used_are_refused(codec: ChatText):
    mute = AutoTokenizer.from_pretrained(codec.tokenizer.name_or_path)
    mute.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatText(mute, CAPTION)
    mute.chat_template = "hello"
    with pytest.raises(UserError, match="does not repeat"):
        ChatText(mute, CAPTION)


def test_a_template_without_an_end_ends_with_the_tokenizers_own(codec: ChatText):
    plain = AutoTokenizer.from_pretrained(codec.tokenizer.name_or_path)
    plain.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    target = ChatText(plain, CAPTION).encode(Annotation(text="x"), "sound", 0)
    assert int(target.tokens[-1]) == plain.eos_token_id
    assert torch.equal(target.tokens[target.supervised], target.tokens[target.prompt_length :])
