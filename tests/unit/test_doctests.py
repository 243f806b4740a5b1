"""The examples in docstrings run, in a folder that holds what they name."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from whisper_aut import load_encoder

MODULES = (
    "errors",
    "audio.windows",
    "inference.embed",
    "inference.encoder",
    "inference.search",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, in_pipeline_run: Path):
    module = importlib.import_module(f"whisper_aut.{name}")
    names = {**vars(module), "load_encoder": load_encoder, "np": np, "torch": torch}
    found = doctest.testmod(module, globs=names)
    assert found.attempted
    assert not found.failed
