"""The folder in which the pages of docs/ are followed."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPOSITORY
from whisper_aut.audio.augment import AUGMENTATIONS
from whisper_aut.corpora.recipes import RECIPES
from whisper_aut.models.adapters import ADAPTERS
from whisper_aut.models.decoders import DECODERS


@pytest.fixture
def reader_folder(
    pipeline_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The folder that the pages of docs/ start from, as the working directory.

    Registries are restored afterwards.
    """
    shutil.copytree(pipeline_run / "runs", tmp_path / "runs", symlinks=True)
    (tmp_path / "data").symlink_to(pipeline_run / "data")
    shutil.copytree(pipeline_run / "clips", tmp_path / "clips")
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    shutil.copy(pipeline_run / "clip.wav", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registries: list[dict[str, Any]] = [DECODERS, ADAPTERS, RECIPES, AUGMENTATIONS]
    before = [dict(registry) for registry in registries]
    yield tmp_path
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
