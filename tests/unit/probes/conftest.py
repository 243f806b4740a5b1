"""Tiny real shards: tones whose pitch is the class, in noise; and a tiny encoder over true log-mel
frames.
"""

from pathlib import Path

import pytest

from tests.support.probes import TinyEncoder, make_task, write_tones
from whisper_aut.probes.modules import AdamProbe


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """A data folder with `tones/train`, `valid` and `test`."""
    root = tmp_path_factory.mktemp("data")
    for seed, (split, clips) in enumerate({"train": 16, "valid": 8, "test": 10}.items()):
        write_tones(root / "tones" / split, clips, seed)
    return root


@pytest.fixture
def task_with():
    return make_task


@pytest.fixture
def tiny_encoder():
    return TinyEncoder


@pytest.fixture
def write_shards():
    return write_tones


@pytest.fixture
def few_epochs(monkeypatch: pytest.MonkeyPatch):
    """Probes that train by epochs stop early: for tests of what is done with their scores."""
    monkeypatch.setattr(AdamProbe, "max_epochs", 8)
