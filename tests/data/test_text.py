"""Whisper's tokens: the prompt as the processor builds it, limits, and hostile captions."""

from pathlib import Path

import pytest

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.data.text import DomainPrompt, WhisperText, language_code
from whisper_aut.errors import Reason, SampleRefused
from whisper_aut.model.start import Start


@pytest.fixture(scope="module")
def tokenizer(tiny_whisper: Path):
    return Start(str(tiny_whisper)).tokenizer


@pytest.mark.parametrize(
    ("language", "task"), [("en", "transcribe"), ("de", "translate"), ("yue", "transcribe")]
)
def test_tokens_are_those_of_the_processor(tokenizer, language: str, task: str):
    codec = WhisperText(tokenizer, {"sound": DomainPrompt(task, language)})
    target = codec.encode(Annotation(text="rain falls on a tin roof"), "sound", 0)
    tokenizer.set_prefix_tokens(language=language, task=task, predict_timestamps=False)
    assert target.tokens.tolist() == tokenizer("rain falls on a tin roof").input_ids
    assert tokenizer.convert_ids_to_tokens(target.tokens[:4].tolist()) == [
        "<|startoftranscript|>",
        f"<|{language}|>",
        f"<|{task}|>",
        "<|notimestamps|>",
    ]


def test_a_sample_may_say_its_own_language(tokenizer):
    codec = WhisperText(tokenizer, {"speech": DomainPrompt(language="sample")})
    for given, used in (("fr", "fr"), ("", "en"), ("klingon", "en")):
        tokens = codec.encode(Annotation(text="x", language=given), "speech", 0).tokens
        assert tokenizer.convert_ids_to_tokens(int(tokens[1])) == f"<|{used}|>"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("fr", "fr"),
        ("FR", "fr"),
        ("fr-FR", "fr"),
        ("fr_fr", "fr"),
        ("French", "fr"),
        ("zh-CN", "zh"),
        ("mandarin", "zh"),
        ("", "en"),
        ("klingon", "en"),
    ],
)
def test_languages_are_said_in_several_ways(said: str, code: str):
    assert language_code(said) == code


def test_english_only_checkpoints_get_no_language_and_task(tokenizer):
    target = WhisperText(tokenizer, multilingual=False).encode(Annotation(text="x"), "speech", 0)
    assert tokenizer.convert_ids_to_tokens(target.tokens[:2].tolist()) == [
        "<|startoftranscript|>",
        "<|notimestamps|>",
    ]
    assert target.prompt_length == 2


def test_supervision_starts_behind_the_start_token_or_behind_the_prompt(tokenizer):
    annotation = Annotation(text="rain falls")
    everything = WhisperText(tokenizer).encode(annotation, "sound", 0)
    answer_only = WhisperText(tokenizer, supervise_prompt=False).encode(annotation, "sound", 0)
    assert everything.supervised.sum() == len(everything.tokens) - 1
    assert answer_only.supervised.sum() == len(everything.tokens) - 4
    assert everything.prompt_length == answer_only.prompt_length == 4


def test_long_labels_are_cut_or_dropped(tokenizer):
    annotation = Annotation(text="rain " * 1000)
    cut = WhisperText(tokenizer).encode(annotation, "sound", 0)
    assert len(cut.tokens) == 448
    assert int(cut.tokens[-1]) != tokenizer.eos_token_id  # a text that was cut does not end there
    with pytest.raises(SampleRefused) as caught:
        WhisperText(tokenizer, overflow="drop").encode(annotation, "sound", 0)
    assert caught.value.reason is Reason.LABEL_TOO_LONG


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_no_text_is_refused(tokenizer, text: str):
    with pytest.raises(SampleRefused) as caught:
        WhisperText(tokenizer).encode(Annotation(text=text), "sound", 0)
    assert caught.value.reason is Reason.NO_TEXT


def test_special_tokens_in_a_caption_are_text(tokenizer):
    codec = WhisperText(tokenizer)
    target = codec.encode(Annotation(text="stop <|endoftext|> <|en|> here"), "sound", 0)
    assert target.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert codec.decode(target.tokens.tolist()) == "stop <|endoftext|> <|en|> here"


@pytest.mark.parametrize("text", ["naïve café", "東京の雨", "🎵 la la", "a\u0000b"])
def test_any_text_survives_the_round_trip(tokenizer, text: str):
    codec = WhisperText(tokenizer)
    assert codec.decode(codec.encode(Annotation(text=text), "speech", 0).tokens.tolist()) == text
