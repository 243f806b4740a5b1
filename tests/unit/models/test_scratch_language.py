"""The small language model: it learns to answer from what is written, and is made once."""

import random
from pathlib import Path

import pytest
import torch

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.targets import AUDIO, ChatText, Instruction, Instructions
from whisper_aut.errors import UserError
from whisper_aut.models import tiny as scratch_language
from whisper_aut.models.language import load_language_model, packed_states, weights_hash
from whisper_aut.models.tiny import LanguageScratch, make_language_model

CAPTION = Instructions({"caption": Instruction(["Describe it.", "What is it?"])})


def test_reading_teaches_it_to_repeat(tiny_language_model: Path):
    """Twice the chats of one text: where it is written at the audio's place, the answer is likelier than where another is."""
    model, tokenizer = load_language_model(str(tiny_language_model))
    codec = ChatText(tokenizer, CAPTION)

    def loss_of(answer: str, written: str) -> float:
        text = scratch_language._Text(Annotation(text=answer), "sound")
        reader = scratch_language._Reader(codec, [text], 1, random.Random(0))
        chat = reader._written_out(codec.encode(text.annotation, "sound", 0), [written])
        assert AUDIO not in chat.tokens.tolist()
        with torch.no_grad():
            states = packed_states(
                model, model.get_input_embeddings()(chat.tokens), [len(chat.tokens)]
            )
        places = chat.supervised.nonzero()[:, 0]
        logits = states[places - 1] @ model.get_input_embeddings().weight.T  # pyright: ignore[reportOperatorIssue]
        return torch.nn.functional.cross_entropy(logits, chat.tokens[places]).item()

    pairs = [
        ("a dog barks twice", "nine birds sing"),
        ("rain falls on a tin roof", "turn the light off"),
    ]
    for one, other in pairs:
        assert loss_of(one, one) < loss_of(one, other)


def test_what_is_asked_for_is_always_told_and_the_rest_at_times(tiny_language_model: Path):
    """In the tokens that the answer has: a model that copies needs no second spelling of each word."""
    _, tokenizer = load_language_model(str(tiny_language_model))
    asked = Instruction(["What?"], "{label:words}")
    codec = ChatText(
        tokenizer, Instructions({"class": asked, "caption": Instruction(["Say it."], weight=1e-9)})
    )
    text = scratch_language._Text(
        Annotation(text="rain on a tin roof", label="water_drops"), "sound"
    )
    reader = scratch_language._Reader(codec, [text], 1, random.Random(0))
    chats = list(reader.batch(60))
    told = [codec.decode(chat.tokens[chat.heard].tolist()).split("\n") for chat in chats]
    assert all("water drops" in facts for facts in told)
    assert 15 <= sum("rain on a tin roof" in facts for facts in told) <= 45
    assert {facts[0] for facts in told} == {"water drops", "rain on a tin roof"}
    answer = chats[0].tokens[chats[0].supervised][:-1].tolist()
    for chat in chats:
        written = chat.tokens[chat.heard].tolist()
        assert any(written[at : at + len(answer)] == answer for at in range(len(written)))


def test_it_is_made_once_and_anew_when_anything_changes(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scratch = LanguageScratch(
        [str(tiny_shards / "sound")],
        str(tmp_path),
        width=16,
        layers=1,
        heads=2,
        vocabulary=300,
        steps=2,
    )
    first = make_language_model(scratch, CAPTION)
    model, _ = load_language_model(first)
    with monkeypatch.context() as patch:
        patch.setattr(scratch_language, "_trained", lambda *_: pytest.fail("trained again"))
        assert make_language_model(scratch, CAPTION) == first
    assert (
        make_language_model(scratch, Instructions({"caption": Instruction(["Say it."])})) != first
    )
    assert not list(tmp_path.glob(".*partial"))
    scratch.out = str(tmp_path / "elsewhere")
    again, _ = load_language_model(make_language_model(scratch, CAPTION))
    assert weights_hash(model) == weights_hash(again)


def test_texts_that_no_instruction_fits_are_refused(tiny_shards: Path, tmp_path: Path):
    music = Instructions({"caption": Instruction(["Describe it."], domains=["music"])})
    scratch = LanguageScratch([str(tiny_shards / "sound")], str(tmp_path))
    with pytest.raises(UserError, match="fits an instruction"):
        make_language_model(scratch, music)
    with pytest.raises(UserError, match="There are no shards at nowhere"):
        make_language_model(LanguageScratch(["nowhere"], str(tmp_path)), music)
