"""Rules that a machine can check: import direction, safe loading, and a README that is true."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "whisper_aut"
STAGES = ("corpora", "data", "model", "training", "export", "probes", "report")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def stage_of(module: str) -> int:
    """Return how far along the data a module stands; the ground that all stand on is -1, what drives all is behind the last."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in STAGES:
        return STAGES.index(parts[1])
    # The schema of settings is read by builders from training on; errors and schema by everyone.
    ground = {
        "whisper_aut",
        "whisper_aut.errors",
        "whisper_aut.schema",
        "whisper_aut.settings",
        "whisper_aut.turns",
    }
    if module in ground:
        return -1
    drivers = ("pipeline", "experiments")  # one run; many of them. The commands drive both
    return len(STAGES) + (drivers.index(parts[1]) if parts[1] in drivers else len(drivers))


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "whisper_aut"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_along_the_data(path: Path):
    module = module_of(path)
    if module in (
        "whisper_aut",
        "whisper_aut.settings",
    ):  # the first re-exports lazily, the second checks domain names
        return
    backwards = {name for name in imports_of(path) if stage_of(name) > stage_of(module)}
    assert not backwards, f"{module} imports from later stages: {sorted(backwards)}"


def test_only_builders_read_settings():
    readers = {module_of(path) for path in SOURCES if "whisper_aut.settings" in imports_of(path)}
    assert readers == {
        "whisper_aut.commands.training",
        "whisper_aut.experiments.runs",
        "whisper_aut.experiments.settings",
        "whisper_aut.pipeline",
        "whisper_aut.training.build",
        "whisper_aut.training.train",
    }


def test_modules_have_a_docstring():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


def test_nothing_is_unpickled_and_no_remote_code_runs():
    forbidden = re.compile(
        r"weights_only\s*=\s*False|trust_remote_code\s*=\s*True|pickle\.loads?\(|yaml\.load\("
    )
    hits = [
        f"{path}: {match.group()}"
        for path in SOURCES
        for match in forbidden.finditer(path.read_text())
    ]
    assert not hits


def test_the_readmes_tree_is_the_real_one():
    readme = (REPOSITORY / "README.md").read_text()
    tree = re.search(r"```text\nwhisper_aut/\n(.*?)\nconf/", readme, re.S)
    assert tree, "README.md has no tree of whisper_aut/"
    named = set(re.findall(r"\b([a-z_]+/|[a-z_]+\.py)", tree.group(1)))
    real = {path.name for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    real |= {
        f"{path.name}/"
        for path in PACKAGE.iterdir()
        if path.is_dir() and path.name != "__pycache__" and not path.is_symlink()
    }
    assert real <= named, f"not in the README's tree: {sorted(real - named)}"
    files = {path.name for path in SOURCES} | {f"{path.parent.name}/" for path in SOURCES}
    assert named <= files, f"named in the README but not there: {sorted(named - files)}"


def test_every_make_target_of_the_readme_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    for document in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        assert set(re.findall(r"^\s*make ([a-z-]+)", document.read_text(), re.M)) <= targets
