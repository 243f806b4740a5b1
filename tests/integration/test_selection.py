"""What an audit and an allow-list do to a run: clips left out, errors, warnings, records."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import binom

from tests.support import REPOSITORY
from tests.support.audio import encode_audio, tone, write_shards
from tests.support.training import QUIET, settings_for
from whisper_aut.config import load_settings
from whisper_aut.corpora.audit import run_audit
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.dataset import ShardNoise
from whisper_aut.data.sampler import Cursor
from whisper_aut.data.shards import open_index
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.pipeline import PipelineOptions, run_pipeline
from whisper_aut.training.factory import (
    build_augment,
    build_data,
    build_decoder,
    build_pretrained,
)
from whisper_aut.training.plan import stored_audio
from whisper_aut.training.train import train


@pytest.fixture(scope="module")
def audited(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of the tiny shards against the very clips of one of them."""
    out = tmp_path_factory.mktemp("audit")
    run_audit([str(tiny_shards)], [str(tiny_shards / "sound")], out, workers=1, progress=False)
    return out


def write_licensed(folder: Path, clips: int, allowed: int) -> Path:
    """Write clips of which the last ones are CC BY, and the others CC BY-NC."""
    with ShardWriter(folder, max_bytes=60_000) as shards:
        for number in range(clips):
            seconds = 0.2 + 0.01 * (number % 10)
            licence = "CC BY 4.0" if number >= clips - allowed else "CC BY-NC 4.0"
            annotation = Annotation(
                "a tone", folder.name, licence=licence, duration_seconds=seconds
            )
            shards.write(f"{folder.name}-{number}", "flac", encode_audio(tone(seconds)), annotation)
    return folder


@pytest.mark.parametrize("batches", ["clips", "seconds", "clips of bare tars"])
def test_a_source_that_is_mostly_left_out_keeps_its_weight_and_batches_are_full(
    batches: str, tiny_whisper: Path, tmp_path: Path
):
    """One tenth of the music is allowed: half of what is drawn is music all the same."""
    for domain, allowed in (("speech", 60), ("music", 6)):
        folder = write_licensed(tmp_path / domain, 60, allowed)
        if batches == "clips of bare tars":
            (folder / "index.json").unlink()
    sources = ", ".join(
        f"{{path: {tmp_path}/{domain}, domain: {domain}}}" for domain in ("speech", "music")
    )
    seconds = ["data.batch_seconds=4", "data.max_seconds=1"] if batches == "seconds" else []
    settings = load_settings(
        REPOSITORY / "conf" / "smoke.yaml",
        [
            "model.after=",
            f"model.path={tiny_whisper}",
            f"data.train=[{sources}]",
            "data.valid=[]",
            "data.domains={speech: 0.5, sound: 0, music: 0.5}",
            "data.licences.allow=[CC-BY]",
            "data.batch_clips=16",
            "data.samples_per_epoch=640",
            *seconds,
        ],
    )
    start = build_pretrained(settings)
    _, codec = build_decoder(settings, start)
    data = build_data(settings, codec, 80)
    read = list(data.train_dataloader())
    assert not [refusal for batch in read for refusal in batch.skipped]
    clips = [key for batch in read for key in batch.keys]
    music = [key for key in clips if key.startswith("music")]
    assert set(music) == {f"music-{number}" for number in range(54, 60)}
    low, high = binom.interval(0.999, len(clips), 0.5)
    assert low <= len(music) <= high
    if seconds:
        spoken = [sum(batch.mel_lengths) / 100 for batch in read]
        assert min(spoken) > 0.9 * 4
    else:
        assert {len(batch) for batch in read} == {16}


def test_an_epoch_is_every_clip_that_is_left_once_whatever_the_ranks(
    tiny_whisper: Path, tmp_path: Path
):
    write_licensed(tmp_path / "music", 60, 25)
    settings = load_settings(
        REPOSITORY / "conf" / "smoke.yaml",
        [
            "model.after=",
            f"model.path={tiny_whisper}",
            f"data.train=[{{path: {tmp_path}/music, domain: music}}]",
            "data.valid=[]",
            "data.domains={speech: 0, sound: 0, music: 1}",
            "data.mode=epochs",
            "data.licences.allow=[CC-BY]",
        ],
    )
    _, codec = build_decoder(settings, build_pretrained(settings))
    data = build_data(settings, codec, 80)
    alone = [key for batch in data.train_dataloader() for key in batch.keys]
    assert sorted(alone) == sorted(f"music-{number}" for number in range(35, 60))
    count = data.batching.count(Cursor(), 25)
    ranks = [list(data.train_stream(rank, 2, Cursor(), 25, -(-count // 2))) for rank in (0, 1)]
    both = [key for row in zip(*ranks, strict=True) for batch in row for key in batch.keys]
    assert both == alone


def test_noise_a_new_tokenizer_and_the_plan_go_by_the_clips_that_are_left(
    tmp_path: Path,
):
    write_licensed(tmp_path / "music", 20, 5)
    write_licensed(tmp_path / "sound", 20, 2)
    settings = load_settings(
        REPOSITORY / "conf" / "smoke.yaml",
        [
            "model.after=",
            "model.scratch={vocabulary: 300}",
            f"runs={tmp_path}/runs",
            f"data.train=[{{path: {tmp_path}/music, domain: music}}]",
            f"data.augment.noise=[{tmp_path}/sound]",
            "data.valid=[]",
            "data.domains={speech: 0, sound: 0, music: 1}",
            "data.licences.allow=[CC-BY]",
        ],
    )
    noise = build_augment(settings).noise
    assert isinstance(noise, ShardNoise)
    assert [index.samples for index in noise.indexes] == [2]
    assert stored_audio(settings.data)[0].clips == 5
    some = build_pretrained(settings).path
    settings.data.licences.allow.clear()
    assert stored_audio(settings.data)[0].clips == 20
    assert build_pretrained(settings).path != some


def test_excluded_clips_are_not_trained_on_and_the_run_says_so(
    audited: Path, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    lines = (audited / "exclude.jsonl").read_text().splitlines()
    excluded = {json.loads(line)["key"]: line for line in lines}
    assert {key for key in excluded if key.startswith("sound")} == {
        f"sound-{number:04d}" for number in range(11)
    }
    listed = tmp_path / "audit" / "exclude.jsonl"  # five of the eleven
    listed.parent.mkdir()
    listed.write_text("\n".join(excluded[f"sound-{number:04d}"] for number in range(5)) + "\n")
    (listed.parent / "audit.json").write_bytes((audited / "audit.json").read_bytes())
    settings = settings_for(
        tiny_whisper, tiny_shards, tmp_path, f"data.exclude={listed}", "probe.tasks=[]"
    )
    console = Console(file=StringIO(), width=1000)
    run = run_pipeline(settings, PipelineOptions(REPOSITORY / "conf" / "smoke.yaml"), console)
    said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "sound: training on 6 of 11 clips; left out: 5 excluded by an audit" in said
    assert not (run.path / "ledger.jsonl").exists()
    assert json.loads((run.path / "audit.json").read_text())["counts"]["train_clips"] == 43
    sources = json.loads((run.path / "environment.json").read_text())["data"]
    assert [source["left_out"] for source in sources] == [{}, {"excluded by an audit": 5}, {}]
    assert [source["clips"] for source in sources] == [23, 6, 9]


def test_a_source_of_which_the_list_leaves_nothing_is_an_error(
    audited: Path, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    exclude = f"data.exclude={audited}/exclude.jsonl"
    with pytest.raises(UserError, match=r"leave no clips of .*sound \(no licence\)"):
        train(settings_for(tiny_whisper, tiny_shards, tmp_path, exclude), QUIET)


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
    with pytest.raises(UserError, match=r"leave no clips of .*sound \(CC-BY-NC-4.0\)"):
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
    assert source["weight"] == 1.0


def test_a_probe_set_that_nobody_audited_is_named(audited: Path, tiny_shards: Path, tmp_path: Path):
    from whisper_aut.loading import load_tasks
    from whisper_aut.pipeline import _warn_if_not_audited

    write_shards(tmp_path / "other", 4, "music")
    tasks = []
    for name, folder in (("known", tiny_shards / "sound"), ("unknown", tmp_path / "other")):
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\ntitle: t\ndomain: sound\nmetric: accuracy\n"
            f"train: [{tiny_shards}/speech]\ntest: [{folder}]\n"
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
        _warn_if_not_audited(settings, tasks, console)
        return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]

    assert "clips of known, unknown may be in the training shards" in said()
    warned = said(f"data.exclude={audited}/exclude.jsonl")
    assert "clips of unknown may be" in warned
    assert f"whisper-aut data audit {tiny_shards}/speech" in warned
    tasks.pop()
    assert said(f"data.exclude={audited}/exclude.jsonl") == ""
