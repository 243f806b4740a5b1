"""The wheel: its configs, what works without extras, and what is said where one is missing."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import REPOSITORY
from tests.support.audio import encode_audio, tone
from whisper_aut.config import PACKAGE_CONF, find_config, load_settings
from whisper_aut.errors import EXTRAS
from whisper_aut.probes.tasks import expand_suites, load_task


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in ("whisper_aut", "conf"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=leave_out)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_configs_are_found_by_name_outside_a_checkout(installed: Path, tmp_path: Path):
    shipped = sorted(path.relative_to(PACKAGE_CONF) for path in PACKAGE_CONF.rglob("*.yaml"))
    conf = installed / "whisper_aut" / "conf"
    assert sorted(path.relative_to(conf) for path in conf.rglob("*.yaml")) == shipped
    (tmp_path / "mine.yaml").write_text("defaults: [smoke, _self_]\nname: mine\n")
    code = """
import whisper_aut
from whisper_aut.cli import main
from whisper_aut.config import compose, load_settings
print(whisper_aut.__file__)
assert main(["train", "--print-config", "aut_tiny"]) == 0
assert load_settings("conf/aut.yaml").name == "aut"
assert load_settings("mine.yaml", ["strategy=ddp"]).strategy.name == "ddp"
assert compose("e5_layers", kind="experiments")["reference"] == "aut/mean/output"
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(str(installed))
    assert "name: aut_tiny" in run.stdout


def test_the_working_directory_comes_before_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert find_config("aut") == PACKAGE_CONF / "aut.yaml"
    assert find_config("conf/decoder/whisper.yaml") == PACKAGE_CONF / "decoder" / "whisper.yaml"
    assert find_config("nothing_like_it") == Path("nothing_like_it")
    folder = tmp_path / "conf" / "decoder"
    folder.mkdir(parents=True)
    (tmp_path / "conf" / "aut.yaml").write_text("defaults: [smoke, _self_]\nname: own\n")
    (folder / "whisper.yaml").write_text("name: whisper\ndrop_text: 0.25\n")
    assert find_config("aut") == Path("conf/aut.yaml")
    assert load_settings("aut").name == "own"
    assert load_settings("aut").decoder["drop_text"] == 0.25
    assert load_settings("aut_tiny").decoder["drop_text"] == 0.25


def test_tasks_and_suites_of_the_package_are_found_anywhere(tmp_path: Path):
    tasks = tmp_path / "conf" / "probe_tasks"
    tasks.mkdir(parents=True)
    suites = tmp_path / "conf" / "suites"
    suites.mkdir()
    (suites / "ours.yaml").write_text("tasks: [esc50, own]\n")
    (tasks / "own.yaml").write_text((PACKAGE_CONF / "probe_tasks" / "fsdd.yaml").read_text())
    names = expand_suites(["ours", "small"], suites)
    assert names[:2] == ["esc50", "own"]
    assert "gmnotes" in names
    for name in names:
        load_task(name, tasks)


@pytest.fixture(scope="module")
def base_python(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and its dependencies, without extras.

    The dependencies are links to what is installed here: the test needs no network.
    """
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    shutil.copytree(installed, site, dirs_exist_ok=True)
    for name in dependencies():
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(distribution(name).locate_file(top)))
    return folder / "bin" / "python"


def dependencies() -> set[str]:
    """Names of what the base install requires, directly or not."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found, queue = set(), [Requirement(line) for line in project["dependencies"]]
    while queue:
        requirement = queue.pop()
        try:
            lines = distribution(requirement.name).requires or ()
        except PackageNotFoundError:
            continue  # a dependency for another platform
        key = (requirement.name, *sorted(requirement.extras))
        if key in found:
            continue
        found.add(key)
        for line in lines:
            needed = Requirement(line)
            extras = ("", *requirement.extras)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                queue.append(needed)
    return {name for name, *_ in found}


def test_the_base_install_embeds_searches_and_names_missing_extras(
    base_python: Path, tiny_whisper: Path, tmp_path: Path
):
    clips = tmp_path / "clips"
    clips.mkdir()
    for pitch_hz in (200.0, 1000.0):
        (clips / f"{pitch_hz:.0f}.flac").write_bytes(encode_audio(tone(1.0, pitch_hz)))
    code = f"""
import sys, whisper_aut
from whisper_aut.cli import main

whisper = {str(tiny_whisper)!r}
assert whisper_aut.__file__.startswith({str(base_python.parent.parent)!r})
encoder = whisper_aut.load_encoder(whisper)
assert encoder.embed(["clips/200.flac"]).shape == (1, encoder.width)
for command in ("embed {{}} clips --out x.safetensors", "search x.safetensors clips/1000.flac"):
    assert main(command.format(whisper).split()) == 0, command
assert not {{"lightning", "webdataset", "pydantic", "iso639"}} & set(sys.modules)
for command in ("train aut_tiny", "probe {{}} --tasks fsdd", "data inspect clips",
                "embed {{}} clips --out x.parquet"):
    assert main(command.format(whisper).split()) == 1, command
try:
    import whisper_aut.training.train
except ImportError as error:
    print("ImportError:", error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [base_python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1000.flac" in run.stdout
    advice = "is not installed. Run: pip install 'whisper-aut"
    errors = [line for line in run.stderr.splitlines() if advice in line]
    extras = [line.rpartition("[")[2] for line in errors]
    assert extras == ["probe]'", "probe]'", "data]'", "parquet]'"]
    assert f"ImportError: lightning {advice}[probe]'" in run.stdout


def test_the_table_of_extras_agrees_with_the_project_file():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    packages = packages_distributions()
    for extra, modules in EXTRAS.items():
        names = {Requirement(line).name for line in extras[extra]} - {"whisper-aut"}
        assert len(modules) == len(names)
        for module in modules:
            if module in packages:  # mteb and other trackers are not part of `make setup`
                assert packages[module][0].lower() in names, f"{module} is not in {extra}"
