"""README and docs/ are true: their Python runs, their commands parse, what they name exists.

A block with a title is the file of that name. `export.md` is followed from top to bottom, commands
included, in a folder that has what it says; `test_extend.py` does that for each section of
`extend.md`. The first section of `data.md` is followed. Of the other pages, Python is run and
commands are parsed with their configs.
"""

import argparse
import ast
import csv
import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.support import REPOSITORY
from tests.support.audio import encode_audio, tone
from tests.support.pages import BLOCK, DOCS, blocks_of, follow
from whisper_aut import __version__
from whisper_aut import config as settings
from whisper_aut.cli import _parse, _parser, main
from whisper_aut.config import Settings, load_settings
from whisper_aut.data.targets import Instruction, Instructions
from whisper_aut.experiments.grid import load_experiment
from whisper_aut.loading import load_tasks
from whisper_aut.models.decoders import DECODERS, check_decoder
from whisper_aut.probes.tasks import task_from_mapping
from whisper_aut.schema import build

CONF = REPOSITORY / "conf"
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
FOLLOWED = {"export.md", "extend.md"}
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
KEY = re.compile(
    r"^(data|optim|trainer|model|decoder|probe|hardware|strategy|corpora|adapter|lora)\.([a-z_.]+)(?==|$)"
)
FILE = re.compile(r"^(?:conf|docs|tests|benchmarks|notebooks|whisper_aut)/[\w./]+$")
PLACEHOLDERS = {"my_task"}  # names of what the reader is told to make
THEIRS = {"--rdzv-id", "--kill-on-bad-exit", "--quantization"}  # of torchrun, Slurm, CTranslate2
QUOTED = re.compile(r"^> `(.+)`$", re.M)

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY))
)


def inline_of(page: Path) -> list[str]:
    return INLINE.findall(BLOCK.sub("", page.read_text()))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```python" in page.read_text() and page.name != "extend.md"],
    ids=lambda page: page.name,
)
def test_what_a_page_tells_to_run_runs(page: Path, reader_folder: Path):
    if page.name == "export.md":
        for package in ("onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    follow(blocks_of(page), commands=page.name in FOLLOWED)


def test_the_first_commands_of_the_data_page_train(
    tiny_whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    table, commands = blocks_of(DOCS / "data.md", "From files to a training step")
    Path("clips.csv").write_text(table.text)
    Path("clips").mkdir()
    for number, row in enumerate(csv.DictReader(table.text.splitlines())):
        kind = Path(row["file"]).suffix[1:].upper()
        Path(row["file"]).write_bytes(encode_audio(tone(1, 300 + 200 * number), kind=kind))
    for _, *words in commands.commands:
        if words[0] == "train":
            words += [f"model.path={tiny_whisper}", "data.batch_clips=1", "export=[]"]
        assert main(words) == 0, words
    assert json.loads(Path("runs/mine/latest/done.json").read_text())["steps"] == 2


@each_page
def test_every_block_says_what_it_is(page: Path):
    for block in blocks_of(page):
        assert block.language in ("", "python", "yaml", "csv", "bash", "text", "mermaid"), (
            block.text
        )
        assert not block.title or page.name in FOLLOWED, (
            "titles are files, which only pages that are followed have"
        )
        if block.language == "bash":
            assert (
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=False).returncode
                == 0
            ), block.text


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in FOLLOWED], ids=lambda page: page.name
)
def test_commands_in_blocks_are_understood(page: Path):
    for block in blocks_of(page):
        for words in block.commands if block.language in ("", "bash") else []:
            if words[0] == "whisper-aut":
                check_command(words[1:])
            elif words[0] == "srun":
                check_command(words[words.index("whisper-aut") + 1 :])
            elif words[0] == "make":
                check_make(words[1:])
            elif words[0] == "torchrun":
                launch = get_args_parser().parse_args(words[1:])
                assert (launch.module, launch.training_script) == (True, "whisper_aut.cli")
                check_command(launch.training_script_args)
            else:
                assert block.language == "bash", (
                    f"not a command that a page may have: {' '.join(words)}"
                )


def check_command(arguments: list[str]) -> None:
    """Parse a command as the command line does; load the config and probe tasks it names."""
    options = _parse(arguments)
    if config := getattr(options, "config", ""):
        path = REPOSITORY / config
        check_decoder(load_settings(path if path.exists() else config, options.overrides).decoder)
    if arguments[0] == "probe":
        load_tasks([name for name in options.tasks if name not in PLACEHOLDERS], CONF)


def check_make(words: list[str]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} \?=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile has no {word}"


def subparser(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser of a command and the words behind its name."""
    parser = _parser()
    while words:
        action = next(
            (a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None
        )
        if action is None:
            break
        assert words[0] in action.choices, f"there is no command {words[0]}"
        parser, words = action.choices[words[0]], words[1:]
    return parser, words


@cache
def all_flags() -> frozenset[str]:
    def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from flags(inner)

    return frozenset(flags(_parser()))


@each_page
def test_commands_flags_files_and_keys_in_the_text_exist(page: Path):
    for code in inline_of(page):
        words = code.replace("…", " ").split()
        if not words:
            continue
        if words[0] == "whisper-aut" and words[1:]:
            parser, rest = subparser(words[1:])
            known = {flag for action in parser._actions for flag in action.option_strings}
            assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, code
        elif words[0] == "make":
            check_make(
                [word for word in words[1:] if "=" not in word or word.partition("=")[0].isupper()][
                    :1
                ]
            )
        elif words[0].startswith("--"):
            assert words[0].partition("=")[0] in all_flags() | THEIRS, code
        for word in words:
            if FILE.match(word) and not re.search(r"[A-Z]{3}", word):
                assert (REPOSITORY / word).exists() or word in titles_of("extend.md"), (
                    f"{page.name}: there is no {word}"
                )
            if (found := KEY.match(word)) and "/" not in word:
                assert is_key(f"{found[1]}.{found[2]}".rstrip(".")), (
                    f"{page.name}: configs have no {word}"
                )


@cache
def titles_of(name: str) -> frozenset[str]:
    return frozenset(block.title for block in blocks_of(DOCS / name))


def is_key(dotted: str) -> bool:
    """Tell whether configs have a key, or the package a module of that name."""
    group, *rest = dotted.split(".")
    if (REPOSITORY / "whisper_aut" / dotted.replace(".", "/")).with_suffix(".py").exists():
        return True
    if group in ("decoder", "adapter", "lora"):
        inside = rest if group == "decoder" else [group, *rest]
        return any(has_field(entry.options, inside) for entry in DECODERS.values())
    return has_field(Settings, [group, *rest])


def has_field(kind: Any, names: list[str]) -> bool:
    if not names:
        return True
    kinds = [kind, *typing.get_args(kind)]
    if typing.get_origin(kind) is dict:  # keys of one's own, such as domains
        return len(names) == 1 or has_field(typing.get_args(kind)[1], names[1:])
    for one in kinds:
        if dataclasses.is_dataclass(one) and names[0] in (hints := typing.get_type_hints(one)):
            return has_field(hints[names[0]], names[1:])
    return False


@each_page
def test_yaml_blocks_are_what_they_stand_for(page: Path, tmp_path: Path):
    for block in blocks_of(page):
        if block.language != "yaml" or block.title.startswith(
            ("conf/decoder", "conf/mine", "tones")
        ):  # those are followed
            continue
        values = yaml.safe_load(block.text)
        if "metric" in values:
            task_from_mapping(values, page.name)
        elif "axes" in values:
            shutil.copytree(REPOSITORY / "conf", tmp_path / "conf", dirs_exist_ok=True)
            experiment = tmp_path / "conf" / "experiments" / "mine.yaml"
            experiment.write_text(block.text)
            assert len(load_experiment(experiment).arms) > 1
        else:
            Instructions({name: build(Instruction, entry, name) for name, entry in values.items()})


@each_page
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text())):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pictures_are_small_and_used():
    text = "".join(page.read_text() for page in PAGES)
    for picture in [*(DOCS / "figures").glob("*.png"), *(DOCS / "figures").glob("*.svg")]:
        assert picture.stat().st_size < 200_000, picture
        assert f"figures/{picture.name}" in text, f"no page shows {picture.name}"


def test_every_page_is_in_the_navigation():
    site = yaml.load(
        (REPOSITORY / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader
    )  # plain text, no tags of mkdocs
    listed = re.findall(r"'([\w/-]+\.md)'", str(site["nav"]))
    written = [page.relative_to(DOCS) for page in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(
        str(page) for page in written if page.parts[0] != "results"
    )  # those are made by the command


def test_every_command_is_on_a_page():
    def commands(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
        inner = next(
            (
                action
                for action in parser._actions
                if isinstance(action, argparse._SubParsersAction)
            ),
            None,
        )
        for word, one in inner.choices.items() if inner else ():
            yield from commands(one, f"{name} {word}")
        if inner is None:
            yield name

    text = "".join(page.read_text() for page in PAGES)
    assert not [name for name in commands(_parser(), "whisper-aut") if name not in text]


def test_the_reference_holds_every_group_of_settings():
    reference = (DOCS / "api" / "training.md").read_text()
    groups = [
        kind
        for kind in vars(settings).values()
        if dataclasses.is_dataclass(kind) and kind.__module__ == settings.__name__
    ]
    assert not [
        kind
        for kind in groups
        if f"::: {settings.__name__}.{kind.__name__}\n" not in reference + "\n"
    ]


def test_every_name_in_the_reference_exists():
    missing = []
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.M):
            module, _, attribute = name.rpartition(".")
            if not hasattr(importlib.import_module(module), attribute):
                missing.append(f"{page.name}: {name}")
    assert not missing


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 250


def test_quoted_messages_are_ones_that_the_program_says():
    """Of messages with values in them, `…` stands for each; a quotation is the whole message or its
    beginning.
    """
    said = {
        text
        for path in (REPOSITORY / "whisper_aut").rglob("*.py")
        for text in literals(ast.parse(path.read_text()))
    }
    quoted = QUOTED.findall((DOCS / "troubleshooting.md").read_text())
    assert len(quoted) > 20
    assert not [message for message in quoted if not any(says(text, message) for text in said)]


def literals(tree: ast.AST) -> Iterator[str]:
    """Yield the texts in a module that are no docstrings, values in them as `…`; texts that stand
    side by side are one.
    """
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )


def says(text: str, message: str) -> bool:
    """Tell whether a text begins as a message does, whatever stands in place of each `…`."""
    first, *rest = message.split("…")
    place = len(first)
    for piece in rest:
        found = text.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    return text.startswith(first)


def test_changelog_and_citation_name_this_version_and_both_papers():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    heading = f"## [{__version__}] - {citation['date-released']}"
    assert heading in (REPOSITORY / "CHANGELOG.md").read_text().splitlines()
    assert (citation["cff-version"], citation["version"], citation["license"]) == (
        "1.2.0",
        __version__,
        "Apache-2.0",
    )
    assert {one["identifiers"][0]["value"] for one in citation["references"]} == {
        "arXiv:2604.10438",
        "arXiv:2602.21772",
    }


def test_figures_against_x_ares_trainer_name_faster_other_sides():
    """It reads tars in every epoch: by itself it says little about what a careful user gains."""
    for page in (*DOCS.glob("*.md"), REPOSITORY / "benchmarks" / "RESULTS.md"):
        for paragraph in page.read_text(encoding="utf-8").split("\n\n"):
            if "X-ARES's trainer" in paragraph:
                assert "in memory" in paragraph, page.name
                assert "scikit-learn" in paragraph, page.name


def test_the_readmes_speeds_are_those_measured():
    readme = (REPOSITORY / "README.md").read_text()
    quoted = re.findall(r"([\d.]+) times as\s+fast", readme)
    results = (REPOSITORY / "benchmarks" / "RESULTS.md").read_text().splitlines()
    cells = [line.split("|")[5].strip() for line in results if line.startswith("| ")]
    ratios = [float(cell) for cell in cells if cell[0].isdigit()]
    assert len(quoted) >= 4
    for figure in quoted:
        decimals = len(figure.partition(".")[2])
        assert any(f"{ratio:.{decimals}f}" == figure for ratio in ratios), (
            f"{figure} is no ratio of RESULTS.md"
        )
