"""Notebooks are valid, have no outputs and name no machine. `make notebooks` runs them."""

import ast
import importlib
import os
import re
import sys
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
    "05_own_corpus",
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


def parameters_of(path: Path) -> str:
    (cell,) = [
        cell.source for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])
    ]
    return cell


@each_notebook
def test_real_weights_are_an_environment_variable(path: Path):
    assert parameters_of(path).startswith('MODEL = os.environ.get("MODEL", "")')


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
    shared = [set(re.findall(r"^SMALL \+?= .*$", _sources(path), re.M)) for path in NOTEBOOKS]
    assert shared[1] == shared[2] == shared[3]
    assert len(shared[1]) > 1
    for path in NOTEBOOKS:
        assert '"runs=runs/notebooks", "data.shards=runs/notebooks/data"' in _sources(path)


@pytest.mark.parametrize("path", NOTEBOOKS[:4], ids=lambda path: path.stem)
@pytest.mark.parametrize("model", ["", "openai/whisper-base"])
def test_the_configs_of_both_scales_load(path: Path, model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    for name in ("DATA", "RUN", "RUNS", "LANGUAGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODEL", model)
    names: dict[str, Any] = {"os": os}
    exec(parameters_of(path), names)
    recipes = (
        names["RECIPES"].values() if "RECIPES" in names else [(names["CONFIG"], names["OVERRIDES"])]
    )
    for config, overrides in recipes:
        settings = load_settings(config, overrides)
        assert settings.model.path == model
        assert "esc10_5fold" in settings.probe.tasks or "demo_sound" in settings.probe.tasks


@pytest.mark.parametrize("number", [1, 2])
def test_stored_scores_have_what_the_notebooks_show(number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (cell,) = [
        cell.source for cell in code_cells(NOTEBOOKS[number]) if "read_encoder(" in cell.source
    ]
    names: dict[str, Any] = {"sys": sys, "re": re, "Path": Path}
    exec(cell.partition("trained = ")[0], names)
    assert len(names["recipes"]["aut"]) >= 5
    assert {"linear esc10_5fold", "knn transfer"} <= set(names["recipes"]["aut"][0])
