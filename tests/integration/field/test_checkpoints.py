"""Checkpoints that broke other tools, as their users reported it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from whisper_aut.errors import UserError
from whisper_aut.loading import open_encoder
from whisper_aut.models.language_model import load_language_model
from whisper_aut.models.pretrained import PretrainedWhisper

WEIGHTS = "model.safetensors"


@pytest.fixture
def whisper(tiny_whisper: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_whisper, tmp_path / "whisper"))


def test_a_download_that_was_interrupted(whisper: Path):
    """QwenLM/Qwen#462: `Error while deserializing header: MetadataIncompleteBuffer`."""
    data = (whisper / WEIGHTS).read_bytes()
    (whisper / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{whisper} is not a usable Whisper"):
        open_encoder(str(whisper), None)


def test_weights_that_a_compiled_model_saved(whisper: Path):
    """karpathy/nanoGPT#325: all names began with `_orig_mod.`; elsewhere, random weights stayed."""
    weights = load_file(whisper / WEIGHTS)
    renamed = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    save_file(renamed, whisper / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights"):
        _ = PretrainedWhisper(str(whisper)).encoder


def test_tied_weights_of_which_only_the_output_layer_was_saved(
    tiny_language_model: Path, tmp_path: Path
):
    """huggingface/transformers#34759: the token embedding of MobileLLM stayed random."""
    folder = Path(shutil.copytree(tiny_language_model, tmp_path / "language"))
    weights = load_file(folder / WEIGHTS)
    expected = weights.pop("model.embed_tokens.weight")
    save_file({**weights, "lm_head.weight": expected}, folder / WEIGHTS, metadata={"format": "pt"})
    model, _ = load_language_model(str(folder))
    assert torch.equal(model.get_input_embeddings().weight, expected)  # pyright: ignore
