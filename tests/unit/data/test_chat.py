"""Annotation → chat tokens: the model's own template, one place for the audio, only the answer
supervised.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.targets import AUDIO, ChatText, Instruction, Instructions
from whisper_aut.errors import SkipReason, SkipSample, UserError

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
    assert codec.encode_question("Describe it.").tolist() == tokens[: target.prompt_length]
    assert codec.decode(tokens[target.prompt_length :]) == target.text == "rain falls on a tin roof"
    assert target.task == "caption"


def test_special_tokens_in_texts_are_text(codec: ChatText):
    target = codec.encode(Annotation(text="stop <|im_end|> here"), "sound", 0)
    end = codec.frame.end
    assert target.tokens[target.prompt_length :].tolist().count(end) == 1
    assert int(target.tokens[-1]) == end
    assert codec.encode_question("<|im_start|>").tolist().count(
        codec.frame.opening[0]
    ) == codec.encode_question("x").tolist().count(codec.frame.opening[0])


def test_long_chats_are_cut_or_refused(codec: ChatText):
    annotation = Annotation(text="rain " * 300)
    cut = ChatText(codec.tokenizer, CAPTION, max_tokens=64).encode(annotation, "sound", 0)
    assert len(cut.tokens) == 64
    assert int(cut.tokens[-1]) != codec.frame.end
    for strict in (
        ChatText(codec.tokenizer, CAPTION, 64, "drop"),
        ChatText(codec.tokenizer, CAPTION, max_tokens=8),
    ):
        with pytest.raises(SkipSample) as refused:
            strict.encode(annotation, "sound", 0)
        assert refused.value.reason == SkipReason.LABEL_TOO_LONG


def test_templates_that_cannot_be_used_are_refused(codec: ChatText):
    mute = AutoTokenizer.from_pretrained(codec.tokenizer.name_or_path)
    mute.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatText(mute, CAPTION)
    mute.chat_template = "hello"
    with pytest.raises(UserError, match="leaves out the given messages"):
        ChatText(mute, CAPTION)


@pytest.mark.parametrize("blank", [" ", "\n", "  ", " \n\t"])
def test_a_blank_that_the_template_writes_before_the_end_token_is_not_the_end(
    codec: ChatText, blank: str
):
    spaced = AutoTokenizer.from_pretrained(codec.tokenizer.name_or_path)
    spaced.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content | trim }}"
        + "{% if turn.role == 'assistant' %}"
        + blank
        + "{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    target = ChatText(spaced, CAPTION).encode(Annotation(text="rain"), "sound", 0)
    assert spaced.decode(target.tokens[target.prompt_length :]) == "rain<|im_end|>"


def test_what_a_template_writes_after_the_answer_is_its_end_only_where_it_is_a_special_token(
    codec: ChatText,
):
    plain = AutoTokenizer.from_pretrained(codec.tokenizer.name_or_path)
    turns = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}"
    plain.chat_template = turns + "\n### END{% endfor %}"
    assert ChatText(plain, CAPTION).frame.end == plain.eos_token_id
    plain.chat_template = turns + " .{{ '<|endoftext|>' }}<|im_end|>{% endfor %}"
    assert ChatText(plain, CAPTION).frame.end == plain.convert_tokens_to_ids("<|endoftext|>")
    plain.chat_template, plain.eos_token = turns + "{% endfor %}", None
    with pytest.raises(UserError, match="a token that ends an answer"):
        ChatText(plain, CAPTION)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('System role is required') }}", "System role is required"),
        ("{{ messages[0].content.text }}{{ messages | nothing }}", "nothing"),
        ("{% for turn in messages %}{{ turn.content + 1 }}{% endfor %}", "str"),
        ("{{ messages[3].content.text }}", "no element 3"),
    ],
)
def test_a_chat_template_that_fails_is_a_user_error_with_its_reason(
    codec: ChatText, template: str, why: str
):
    broken = AutoTokenizer.from_pretrained(codec.tokenizer.name_or_path)
    broken.chat_template = template
    with pytest.raises(UserError, match=rf"(?s)The chat template of .* fails on .*{why}"):
        ChatText(broken, CAPTION)


def test_a_date_in_the_template_is_the_one_that_was_given(codec: ChatText):
    dated = AutoTokenizer.from_pretrained(codec.tokenizer.name_or_path)
    dated.chat_template = (
        "Today is {{ strftime_now('%d %b %Y') }}.{% for turn in messages %}[{{ turn.content }}"
        "{% endfor %}<|im_end|>"
    )
    opening = ChatText(dated, CAPTION, date="2025-02-03").frame.opening
    assert dated.decode(opening) == "Today is 03 Feb 2025.["
    with pytest.raises(UserError, match=r"decoder\.date: 'yesterday' is not a day"):
        ChatText(dated, CAPTION, date="yesterday")
    dated.chat_template = "{% set day = '%d' %}{{ strftime_now(day) }}{{ messages[0].content }}"
    with pytest.raises(UserError, match="prompts would change from day to day"):
        ChatText(dated, CAPTION)


def test_a_template_without_an_end_ends_with_the_tokenizers_own(codec: ChatText):
    plain = AutoTokenizer.from_pretrained(codec.tokenizer.name_or_path)
    plain.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    target = ChatText(plain, CAPTION).encode(Annotation(text="x"), "sound", 0)
    assert int(target.tokens[-1]) == plain.eos_token_id
    assert torch.equal(target.tokens[target.supervised], target.tokens[target.prompt_length :])
