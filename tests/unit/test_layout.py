"""Rules that a machine can check: import direction, file sizes, safe loading, and a layout that is
described as it is.
"""

import ast
import re
from pathlib import Path

import pytest

from tests.support import REPOSITORY

PACKAGE = REPOSITORY / "whisper_aut"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
MAX_FILE_LINES, MAX_FILES, MAX_LINES = 700, 120, 32_471  # the goal is 110 files and 22,000 lines
# A folder or module imports from itself and from those before it.
ORDER = (
    *("errors", "utils", "schema", "onednn", "audio", "data", "corpora", "config", "models"),
    *("training", "inference", "export", "probes", "report", "loading", "pipeline"),
    *("experiments", "commands", "cli"),
)


def imports_of(path: Path, prefix: str = "whisper_aut.") -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.startswith(prefix)}


def part_of(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_forward(path: Path):
    module = module_of(path)
    if module == "whisper_aut":  # it loads its public names lazily
        return
    backwards = {name for name in imports_of(path) if part_of(name) > part_of(module)}
    assert not backwards, f"{module} imports from later parts: {sorted(backwards)}"


def test_the_picture_of_the_imports_in_contributing_is_the_real_one():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    arrows = set(re.findall(r"^  (\w+) --> (\w+)$", text, re.M))
    imports = {
        (name.split(".")[1], module.split(".")[1])
        for path in SOURCES
        if (module := module_of(path)) != "whisper_aut"
        for name in imports_of(path)
    }
    helpers = {"errors", "utils", "schema", "onednn"}
    imports = {(a, b) for a, b in imports if a != b and not helpers & {a, b}}
    assert arrows <= imports
    paths = set(arrows)
    for middle in ORDER:
        into = {start for start, end in paths if end == middle}
        paths |= {(start, end) for start in into for begin, end in paths if begin == middle}
    assert imports <= paths, f"no path of arrows for {sorted(imports - paths)}"


def test_modules_have_a_docstring_and_a_readable_size():
    for path in SOURCES:
        text, name = path.read_text(), path.relative_to(PACKAGE).as_posix()
        assert ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"
        assert len(text.splitlines()) <= MAX_FILE_LINES, f"{name} is too long"


def test_the_package_does_not_grow():
    assert len(SOURCES) <= MAX_FILES
    assert sum(len(path.read_text().splitlines()) for path in SOURCES) <= MAX_LINES


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_test_imports_another(path: Path):
    """Shared helpers are in `tests/support`, fixtures in a conftest.py."""
    imported = imports_of(path, "tests.")
    assert all(name.startswith("tests.support") for name in imported), imported


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


def test_the_tree_in_contributing_is_the_real_one():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    tree = re.search(r"```text\nwhisper_aut/\n(.*?)\n```", text, re.S)
    assert tree, "CONTRIBUTING.md has no tree of whisper_aut/"
    named = set(re.findall(r"\b([a-z_0-9]+/|[a-z_0-9]+\.py)", tree.group(1)))
    real = {path.name for path in SOURCES if path.stem != "__init__"}
    real |= {f"{path.parent.name}/" for path in SOURCES if path.parent != PACKAGE}
    assert real - named == set(), "not in the tree of CONTRIBUTING.md"
    assert named - real == {"conf/"}, "named in the tree of CONTRIBUTING.md, but not there"


def test_every_make_target_of_the_docs_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    for document in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        assert set(re.findall(r"^\s*make ([a-z-]+)", document.read_text(), re.M)) <= targets
