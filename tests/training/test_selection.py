"""What an audit and a list of licences do to a run: clips left out and counted, sources refused, warnings, and what is written down."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import REPOSITORY, write_shards
from tests.training.test_train import QUIET, settings_for
from whisper_aut.corpora.audit import run_audit
from whisper_aut.corpora.shards import open_index
from whisper_aut.errors import Reason, UserError
from whisper_aut.pipeline import Story, run_story
from whisper_aut.settings import load_settings
from whisper_aut.training.train import train


@pytest.fixture(scope="module")
def audited(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of the tiny shards against the very clips of one of them."""
    out = tmp_path_factory.mktemp("audit")
    run_audit([str(tiny_shards)], [str(tiny_shards / "sound")], out, workers=1, progress=False)
    return out


def test_excluded_clips_are_not_trained_on_and_the_run_says_so(
    audited: Path, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    excluded = {
        json.loads(line)["key"] for line in (audited / "exclude.jsonl").read_text().splitlines()
    }
    assert {key for key in excluded if key.startswith("sound")} == {
        f"sound-{number:04d}" for number in range(11)
    }
    # All of one source goes: far above max_skipped_fraction, and no reason to stop.
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path,
        f"data.exclude={audited}/exclude.jsonl",
        "probe.tasks=[]",
    )
    run = run_story(settings, Story(REPOSITORY / "conf" / "smoke.yaml"), QUIET)
    ledger = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in ledger} == {str(Reason.EXCLUDED)}
    assert {line["key"] for line in ledger} <= excluded
    assert json.loads((run.path / "audit.json").read_text())["counts"]["train_clips"] == 43
    sources = json.loads((run.path / "environment.json").read_text())["data"]
    assert [source["excluded"] for source in sources][1] == 11


def test_licences_are_filtered_and_written_down(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    speech = f"{{path: {tiny_shards}/speech, domain: speech, licence: CC BY 4.0}}"
    noncommercial = f"{{path: {tiny_shards}/sound, domain: sound, licence: CC BY-NC 4.0}}"
    allow = [
        "data.licences.allow=[CC-BY]",
        "data.valid=[]",
        "data.domains={speech: 1, sound: 0, music: 0}",
        "trainer.max_steps=1",
    ]
    with pytest.raises(UserError, match=r"leaves nothing of .*sound \(CC-BY-NC-4.0\)"):
        train(
            settings_for(
                tiny_whisper,
                tiny_shards,
                tmp_path,
                f"data.train=[{speech}, {noncommercial}]",
                *allow,
            ),
            QUIET,
        )
    trained = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path, f"data.train=[{speech}]", *allow), QUIET
    )
    (source,) = json.loads((trained.run.path / "environment.json").read_text())["data"]
    seconds = pytest.approx(open_index(tiny_shards / "speech").seconds, abs=0.01)
    assert source["licences"] == {"CC-BY-4.0": {"clips": 23, "seconds": seconds}}
    assert source["share"] == 1.0


def test_a_probe_set_that_nobody_audited_is_named(audited: Path, tiny_shards: Path, tmp_path: Path):
    from whisper_aut.pipeline import _warn_of_unaudited, load_tasks

    write_shards(tmp_path / "other", 4, "music")
    tasks = []
    for name, folder in (("known", tiny_shards / "sound"), ("unknown", tmp_path / "other")):
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\ntitle: t\ndomain: sound\ntrain: [{tiny_shards}/speech]\ntest: [{folder}]\nmetric: accuracy\n"
        )
        tasks += load_tasks([str(tmp_path / f"{name}.yaml")], tmp_path)

    def said(*overrides: str) -> str:
        sources = ", ".join(
            f"{{path: {tiny_shards}/{domain}, domain: {domain}}}"
            for domain in ("speech", "sound", "music")
        )
        settings = load_settings(
            REPOSITORY / "conf" / "smoke.yaml", [f"data.train=[{sources}]", *overrides]
        )
        console = Console(file=StringIO(), width=1000)
        _warn_of_unaudited(settings, tasks, console)
        return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]

    assert "whether clips of known, unknown are in the training shards" in said()
    warned = said(f"data.exclude={audited}/exclude.jsonl")
    assert "whether clips of unknown are" in warned
    assert f"whisper-aut data audit {tiny_shards}/speech" in warned
    tasks.pop()
    assert said(f"data.exclude={audited}/exclude.jsonl") == ""
