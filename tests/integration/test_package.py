"""The installed package contains configs, probe tasks and suites."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from whisper_aut.config import PACKAGE_CONF, find_config, load_settings
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
print(whisper_aut.__file__)
for arguments in ("train --print-config aut_tiny", "train --print-config conf/aut.yaml",
                  "train --print-config mine.yaml strategy=ddp", "experiment --plan e5_layers"):
    assert main(arguments.split()) == 0, arguments
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
    assert all(f"name: {name}" in run.stdout for name in ("aut_tiny", "aut", "mine"))


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
