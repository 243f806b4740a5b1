"""The small language model: it learns to answer from what is written, and is made once."""

import random
from itertools import islice
from pathlib import Path

import pytest
import torch

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.targets import AUDIO, ChatText, Instruction, Instructions
from whisper_aut.errors import UserError
from whisper_aut.models import tiny
from whisper_aut.models.language_model import load_language_model, packed_states, weights_hash
from whisper_aut.models.tiny import LanguageScratch, make_language_model

CAPTION = Instructions({"caption": Instruction(["Describe it.", "What is it?"])})


def test_it_learns_to_answer_from_the_text(tiny_language_model: Path):
    """An answer is likelier after a chat that contains it than after one that contains another."""
    model, tokenizer = load_language_model(str(tiny_language_model))
    codec = ChatText(tokenizer, CAPTION)

    def loss_of(answer: str, fact: str) -> float:
        target = codec.encode(Annotation(text=answer), "sound", 0)
        chat = tiny.replace_audio(codec, target, [fact], random.Random(0))
        assert AUDIO not in chat.tokens.tolist()
        with torch.no_grad():
            states = packed_states(
                model, model.get_input_embeddings()(chat.tokens), [len(chat.tokens)]
            )
        indices = chat.supervised.nonzero()[:, 0]
        logits = states[indices - 1] @ model.get_input_embeddings().weight.T  # pyright: ignore[reportOperatorIssue]
        return torch.nn.functional.cross_entropy(logits, chat.tokens[indices]).item()

    pairs = [
        ("a dog barks twice", "nine birds sing"),
        ("rain falls on a tin roof", "turn the light off"),
    ]
    for one, other in pairs:
        assert loss_of(one, one) < loss_of(one, other)


def test_chats_contain_the_requested_fact_and_some_others(tiny_language_model: Path):
    """In the tokens of the answer: a model that copies needs no second spelling of each word."""
    _, tokenizer = load_language_model(str(tiny_language_model))
    label = Instruction(["What?"], "{label:words}")
    codec = ChatText(
        tokenizer, Instructions({"class": label, "caption": Instruction(["Say it."], weight=1e-9)})
    )
    annotation = Annotation(text="rain on a tin roof", label="water_drops", domain="sound")
    chats = list(islice(tiny.draw_chats(codec, [annotation], random.Random(0), 1), 60))
    facts = [codec.decode(chat.tokens[chat.replaces_audio].tolist()).split("\n") for chat in chats]
    assert all("water drops" in lines for lines in facts)
    assert 15 <= sum("rain on a tin roof" in lines for lines in facts) <= 45
    assert {lines[0] for lines in facts} == {"water drops", "rain on a tin roof"}
    answer = chats[0].tokens[chats[0].supervised][:-1].tolist()
    for chat in chats:
        text = chat.tokens[chat.replaces_audio].tolist()
        assert any(text[start : start + len(answer)] == answer for start in range(len(text)))


def test_it_is_made_once_and_again_when_anything_changes(
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
        patch.setattr(tiny, "train_language_model", lambda *_: pytest.fail("trained again"))
        assert make_language_model(scratch, CAPTION) == first
    assert (
        make_language_model(scratch, Instructions({"caption": Instruction(["Say it."])})) != first
    )
    assert not list(tmp_path.glob(".*partial"))
    scratch.out = str(tmp_path / "elsewhere")
    again, _ = load_language_model(make_language_model(scratch, CAPTION))
    assert weights_hash(model) == weights_hash(again)


def test_texts_that_fit_no_instruction_are_user_errors(tiny_shards: Path, tmp_path: Path):
    music = Instructions({"caption": Instruction(["Describe it."], domains=["music"])})
    scratch = LanguageScratch([str(tiny_shards / "sound")], str(tmp_path))
    with pytest.raises(UserError, match="fits an instruction"):
        make_language_model(scratch, music)
    with pytest.raises(UserError, match="There are no shards at nowhere"):
        make_language_model(LanguageScratch(["nowhere"], str(tmp_path)), music)
