"""Language models that broke other tools, as their users reported it."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.targets import ChatText, Instruction, Instructions
from whisper_aut.errors import UserError
from whisper_aut.models.language_model import load_language_model

TASKS = Instructions({"caption": Instruction(["Describe it."])})
NOTE = Annotation(text="a dog barks", domain="sound", id="1")


def test_a_base_model_without_a_chat_template(tiny_language_model: Path):
    """huggingface/transformers#33246: `tokenizer.chat_template is not set`, deep inside a run."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; pick a language model"):
        ChatText(tokenizer, TASKS)


def test_a_template_that_writes_the_token_that_the_tokenizer_adds_too(tiny_language_model: Path):
    """sgl-project/sglang#888: prompts began with two BOS tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    bos = tokenizer.eos_token
    tokenizer.bos_token = bos
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.add_bos_token = True
    tokens = ChatText(tokenizer, TASKS).encode(NOTE, "sound", 0).tokens.tolist()
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens[1] != tokenizer.bos_token_id


def test_padding_with_the_token_that_ends_an_answer(tiny_language_model: Path):
    """unslothai/unsloth#416: masked like padding, the end was not learned; answers never ended."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    chat = ChatText(tokenizer, TASKS)
    tokenizer.pad_token_id = chat.frame.end
    target = chat.encode(NOTE, "sound", 0)
    assert target.tokens[-1] == chat.frame.end
    assert target.supervised[-1]


def test_a_tokenizer_with_more_tokens_than_the_embedding(tiny_language_model: Path, tmp_path: Path):
    """huggingface/transformers#26714: Code Llama's tokenizer knew 32,004 tokens, its embedding
    32,000: `index out of range`, or a CUDA assertion, in the first batch that had one.
    """
    folder = Path(shutil.copytree(tiny_language_model, tmp_path / "language"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {n}>" for n in range(500)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"<new 499>.* but the model has"):
        load_language_model(str(folder))
