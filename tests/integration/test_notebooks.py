"""Notebooks are valid, have no outputs and name no machine. `make notebooks` runs them."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.support import REPOSITORY
from whisper_aut.config import load_settings

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = [
    "01_shards_and_logmel",
    "02_compare_decoders",
    "03_embeddings_before_after",
    "04_read_a_report",
]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def python_of(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.startswith("%"))


def test_all_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@each_notebook
def test_a_notebook_is_valid_and_stripped(path: Path):
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))
    for cell in code_cells(path):
        assert not cell.outputs, f"outputs in {cell.id}; strip them before committing"
        assert cell.execution_count is None, cell.id
        ast.parse(python_of(cell.source))
    assert not re.search(r"/(home|tmp|work|root)/|[A-Z]:\\\\", path.read_text())


@each_notebook
def test_the_smoke_scale_is_the_default(path: Path):
    tagged = [
        cell.source for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])
    ]
    assert len(tagged) == 1
    assert tagged[0].startswith('SCALE = "smoke"')
    assert '"tiny": ' in tagged[0]


@each_notebook
def test_what_a_notebook_imports_exists(path: Path):
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(python_of(cell.source))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("whisper_aut"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names), node.module


def _sources(path: Path) -> str:
    return "\n".join(cell.source for cell in code_cells(path))


def test_notebooks_share_one_corpus_and_one_run():
    shared = {
        name: set(re.findall(r"^SMALL \+?= .*$", _sources(path), re.M))
        for name, path in zip(NAMES, NOTEBOOKS, strict=True)
    }
    assert shared[NAMES[1]] == shared[NAMES[2]] == shared[NAMES[3]]
    assert all(
        any("data.shards=runs/notebooks/data" in line for line in lines)
        for lines in shared.values()
    )


@each_notebook
@pytest.mark.parametrize("scale", ["smoke", "tiny"])
def test_the_configs_of_both_scales_load(path: Path, scale: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    (cell,) = [
        cell.source for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])
    ]
    names: dict[str, Any] = {"load_settings": load_settings}
    exec(cell.replace('SCALE = "smoke"', f'SCALE = "{scale}"', 1), names)
    recipes = (
        names["RECIPES"][scale].values()
        if "RECIPES" in names
        else [(names["CONFIG"], names["OVERRIDES"])]
    )
    for config, overrides in recipes:
        assert load_settings(config, overrides).probe.tasks == [
            "demo_speech",
            "demo_sound",
            "demo_music",
        ]
