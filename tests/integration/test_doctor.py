"""The doctor: sound machines pass, each fault is found and named, the exit status follows."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import REPOSITORY
from tests.support.training import settings_for
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.cli import main
from whisper_aut.commands.train import _two_steps
from whisper_aut.config import dump_settings, load_settings
from whisper_aut.data.shards import open_index
from whisper_aut.errors import UserError
from whisper_aut.training.doctor import (
    Finding,
    check_devices,
    check_disk,
    check_dry_run,
    check_shards,
    check_versions,
    examine,
)


def test_a_failed_check_is_a_finding_and_the_rest_goes_on():
    def raises(error: Exception) -> Any:
        def check() -> Finding:
            raise error

        return check

    checks = [
        ("a", raises(UserError("no room"))),
        ("b", raises(RuntimeError("broken\nmore"))),
        ("c", check_versions),
    ]
    found = {finding.name: finding for finding in examine(checks)}
    assert (found["a"].status, found["a"].detail) == ("fail", "no room")
    assert found["b"].detail == "RuntimeError: broken"
    assert found["versions"].status == "ok"
    assert "torch 2.11.0" in found["versions"].detail


def test_what_a_config_asks_for_is_compared_with_what_is_there(
    tiny_shards: Path, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert check_devices("gpu", 8).status == "fail"
    assert "needs 8 GPUs, PyTorch sees 0" in check_devices("gpu", 8).detail
    assert check_devices("cpu", 1).status == "ok"
    assert check_disk(tmp_path / "runs", 1000, 3).status == "ok"
    with pytest.raises(UserError, match="Free some space"):
        check_disk(tmp_path, 2**50, 3)
    index = open_index(str(tiny_shards / "speech"))
    assert "23 clips" in check_shards([index], ClipLimits()).detail


def test_a_shard_that_cannot_be_read_is_found(tiny_shards: Path, tmp_path: Path):
    import shutil

    broken = shutil.copytree(tiny_shards / "speech", tmp_path / "speech")
    index = open_index(str(broken))
    for tar in broken.glob("*.tar"):
        tar.write_bytes(b"\1" * 600)
    finding = check_shards([index], ClipLimits())
    assert finding.status == "fail"
    assert "data inspect" in finding.detail


def test_the_command_exits_with_one_where_something_fails(
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path / "runs",
        "hardware.accelerator=gpu",
        "hardware.devices=8",
    )
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    assert main(["doctor", str(tmp_path / "config.yaml"), "--no-dry-run"]) == 1
    shown = capsys.readouterr()
    assert "This machine is not ready: devices." in shown.err
    assert "3 sources" in shown.out or "6 sources" in shown.out
    assert not (tmp_path / "runs").exists(), "the doctor leaves nothing behind"


def test_a_dry_run_asks_for_nothing_that_other_nodes_have(monkeypatch: pytest.MonkeyPatch):
    path = REPOSITORY / "conf" / "aut.yaml"
    settings = load_settings(path, ["hardware=8x8gpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    hardware = _two_steps(settings, path).hardware
    assert (hardware.nodes, hardware.devices) == (1, 4)
    assert (settings.hardware.nodes, settings.hardware.devices) == (8, 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _two_steps(settings, path).hardware.devices == 8  # reported as missing


def test_a_dry_run_that_does_not_end_is_ended_and_said():
    finding = check_dry_run("name: x", minutes=0)  # no process starts in no time
    assert finding.status == "fail"
    assert "two steps did not finish within 0 minutes" in finding.detail


@pytest.mark.slow
def test_the_doctor_trains_two_steps_and_leaves_nothing(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.yaml").write_text(
        dump_settings(settings_for(tiny_whisper, tiny_shards, tmp_path / "runs"))
    )
    assert main(["doctor", str(tmp_path / "config.yaml")]) == 0
    assert "two steps" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_dry_run_starts_its_own_ranks_inside_a_job_too(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)  # as in the shell of a batch job, which waits for nobody
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path,
        "hardware.devices=2",
        "strategy=ddp",
        "probe.tasks=[]",
        "trainer.max_steps=2",
    )
    finding = check_dry_run(dump_settings(settings), minutes=3)
    assert finding.status == "ok", finding.detail
