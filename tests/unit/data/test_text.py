"""Whisper's tokens: the prompt as the processor builds it, limits, and hostile captions."""

from pathlib import Path

import pytest
from transformers import WhisperTokenizer

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.targets import DomainPrompt, WhisperText
from whisper_aut.errors import SkipReason, SkipSample
from whisper_aut.models.pretrained import PretrainedWhisper


@pytest.fixture(scope="module")
def tokenizer(tiny_whisper: Path):
    return PretrainedWhisper(str(tiny_whisper)).tokenizer


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


@pytest.mark.parametrize(
    ("tag", "token"),
    [
        ("fr", "fr"),
        ("deu", "de"),
        ("cmn", "zh"),
        ("nb", "no"),
        ("jv", "jw"),
        ("fr-FR", "fr"),
        ("German", "de"),
        ("yue", "yue"),
        ("", "en"),
        ("  ", "en"),
    ],
)
def test_a_sample_may_state_its_own_language_in_any_usual_way(tokenizer, tag: str, token: str):
    target = WhisperText(tokenizer).encode(Annotation(text="x", language=tag), "speech", 0)
    assert tokenizer.convert_ids_to_tokens(int(target.tokens[1])) == f"<|{token}|>"
    assert not target.unknown_language


@pytest.mark.parametrize("tag", ["tlh", "klingon", "und", "translate", "no_speech"])
def test_a_language_without_a_token_opens_without_a_language_token_and_is_told(tokenizer, tag: str):
    codec = WhisperText(tokenizer)
    target = codec.encode(Annotation(text="rain falls", language=tag), "speech", 0)
    prompt = tokenizer.convert_ids_to_tokens(target.tokens[: target.prompt_length].tolist())
    assert prompt == ["<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]
    assert codec.decode(target.tokens.tolist()) == "rain falls"
    assert target.unknown_language == tag
    assert not target.supervised[: target.prompt_length].any()  # it is given, not learned
    assert target.supervised[target.prompt_length :].all()


def test_language_tokens_are_looked_up_in_the_tokenizer_and_never_computed(tokenizer):
    """Early Whispers have 99 languages: where `<|yue|>` would be by its number they have
    `<|translate|>`.
    """
    vocab = {token: id for token, id in tokenizer.get_vocab().items() if token != "<|yue|>"}
    vocab = {token: id for id, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    special = [token for token in vocab if token.startswith("<|")]
    early = WhisperTokenizer(vocab=vocab, merges=[], extra_special_tokens=special)
    codec = WhisperText(early, {"sound": DomainPrompt("translate", "en")})
    prompt = codec.prompt_tokens("speech", "yue")
    assert early.convert_ids_to_tokens(prompt) == [
        "<|startoftranscript|>",
        "<|zh|>",  # the macrolanguage, as which early Whispers were trained on Cantonese
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    assert early.convert_ids_to_tokens(codec.prompt_tokens("sound", ""))[2] == "<|translate|>"


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
    answer_only = WhisperText(tokenizer, supervise_prompt=()).encode(annotation, "sound", 0)
    assert everything.supervised.sum() == len(everything.tokens) - 1
    assert answer_only.supervised.sum() == len(everything.tokens) - 4
    assert everything.prompt_length == answer_only.prompt_length == 4


def test_supervision_of_prompts_in_some_domains(tokenizer):
    codec = WhisperText(tokenizer, supervise_prompt=["speech"])
    annotation = Annotation(text="rain falls")
    speech, music = (codec.encode(annotation, domain, 0) for domain in ("speech", "music"))
    assert speech.supervised.tolist() == [False] + [True] * (len(speech.tokens) - 1)
    assert music.supervised.tolist() == [False] * 4 + [True] * (len(music.tokens) - 4)


def test_a_prompt_of_words_is_that_of_the_tokenizer_and_is_never_supervised(tokenizer):
    prompts = {"sound": DomainPrompt(language="en", text=" Sounds of rain. ")}
    codec = WhisperText(tokenizer, prompts)
    target = codec.encode(Annotation(text="rain falls"), "sound", 0)
    words = tokenizer.get_prompt_ids("Sounds of rain.").tolist()
    plain = WhisperText(tokenizer).encode(Annotation(text="rain falls"), "sound", 0)
    assert target.tokens.tolist() == words + plain.tokens.tolist()
    assert target.prompt_length == len(words) + 4
    assert target.supervised.tolist() == [False] * len(words) + plain.supervised.tolist()
    assert codec.decode(target.tokens[target.prompt_length :].tolist()) == "rain falls"


@pytest.mark.parametrize("multilingual", [True, False])
def test_captions_can_have_a_task_token_of_their_own(tokenizer, multilingual: bool):
    prompts = {"sound": DomainPrompt("caption", "en")}
    codec = WhisperText(tokenizer, prompts, multilingual=multilingual)
    found = tokenizer.convert_ids_to_tokens(codec.prompt_tokens("sound", ""))
    language = ["<|en|>"] * multilingual
    assert found == ["<|startoftranscript|>", *language, "<|startoflm|>", "<|notimestamps|>"]


def test_long_labels_are_cut_or_dropped(tokenizer):
    annotation = Annotation(text="rain " * 1000)
    cut = WhisperText(tokenizer).encode(annotation, "sound", 0)
    assert len(cut.tokens) == 448
    assert int(cut.tokens[-1]) != tokenizer.eos_token_id  # a text that was cut does not end there
    with pytest.raises(SkipSample) as caught:
        WhisperText(tokenizer, overflow="drop").encode(annotation, "sound", 0)
    assert caught.value.reason is SkipReason.LABEL_TOO_LONG


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_no_text_is_refused(tokenizer, text: str):
    with pytest.raises(SkipSample) as caught:
        WhisperText(tokenizer).encode(Annotation(text=text), "sound", 0)
    assert caught.value.reason is SkipReason.NO_TEXT


def test_special_tokens_in_a_caption_are_text(tokenizer):
    codec = WhisperText(tokenizer)
    target = codec.encode(Annotation(text="stop <|endoftext|> <|en|> here"), "sound", 0)
    assert target.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert codec.decode(target.tokens.tolist()) == "stop <|endoftext|> <|en|> here"


@pytest.mark.parametrize("text", ["naïve café", "東京の雨", "🎵 la la", "a\u0000b"])
def test_any_text_survives_the_round_trip(tokenizer, text: str):
    codec = WhisperText(tokenizer)
    assert codec.decode(codec.encode(Annotation(text=text), "speech", 0).tokens.tolist()) == text
