"""Streams and loaders: the same batches for any number of workers, exact resume, faults counted and
nothing lost.
"""

import multiprocessing
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.audio import encode_audio, tone, write_shards
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import LogMel
from whisper_aut.data import dataset
from whisper_aut.data.annotation import Annotation, FieldMapping
from whisper_aut.data.batch import Batch
from whisper_aut.data.datamodule import ShardDataModule
from whisper_aut.data.dataset import ExampleBuilder, StreamSource
from whisper_aut.data.reader import ReadPolicy
from whisper_aut.data.sampler import Cursor, MixedPadding, batches_from
from whisper_aut.data.settings import DataSettings, SourceSettings
from whisper_aut.data.shards import ShardEntry, ShardIndex, open_index, table_name
from whisper_aut.data.targets import WhisperText
from whisper_aut.data.writer import ShardWriter, index_folder
from whisper_aut.errors import SkipReason, UserError
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.factory import open_sources, source_weights

DOMAINS = ("speech", "sound", "music")


@pytest.fixture(scope="module")
def build(tiny_whisper: Path) -> ExampleBuilder:
    return ExampleBuilder(
        LogMel(80), WhisperText(PretrainedWhisper(str(tiny_whisper)).tokenizer), ClipLimits()
    )


def data_module(
    root: Path, build: ExampleBuilder, domains: tuple[str, ...] = DOMAINS, **options: object
) -> ShardDataModule:
    sources = [StreamSource(open_index(root / domain), domain) for domain in domains]
    settings = {"seed": 0, "window": 6, "batch_clips": 3, "samples_per_epoch": 36, **options}
    return ShardDataModule(sources, sources, [1.0] * len(sources), build, **settings)  # pyright: ignore[reportArgumentType]


def keys_of(batches: list[Batch]) -> list[tuple[str, ...]]:
    return [batch.keys for batch in batches]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(
    tiny_shards: Path, build: ExampleBuilder, workers: int
):
    alone = list(data_module(tiny_shards, build).train_dataloader())
    many = list(data_module(tiny_shards, build, workers=workers).train_dataloader())
    assert len(alone) == 12
    assert keys_of(alone) == keys_of(many)
    assert all(
        torch.equal(a.mel, b.mel) and torch.equal(a.targets.tokens, b.targets.tokens)
        for a, b in zip(alone, many, strict=True)
    )


@pytest.mark.parametrize("stopped_after", [1, 5, 12, 17])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_exactly(
    tiny_shards: Path, build: ExampleBuilder, stopped_after: int, workers: int
):
    whole = data_module(tiny_shards, build).train_dataloader()
    expected = keys_of([*whole, *whole])
    first = data_module(tiny_shards, build, workers=workers).train_dataloader()
    seen, state = [], {}
    while len(seen) < stopped_after:
        for batch in first:
            seen.append(batch.keys)
            state = first.state_dict()
            if len(seen) == stopped_after:
                break
    resumed = data_module(tiny_shards, build, workers=2 - workers).train_dataloader()
    resumed.load_state_dict(state)
    while len(seen) < len(expected):
        seen += keys_of(list(resumed))
    assert seen == expected


def test_a_clip_is_padded_by_its_place_in_the_order_alone(tiny_shards: Path, build: ExampleBuilder):
    """Workers, ranks, resumes and batches of seconds draw the same clips; seeds draw others."""

    def padded(batches: Iterable[Batch]) -> list[tuple[str, bool]]:
        return [pair for batch in batches for pair in zip(batch.keys, batch.padded, strict=True)]

    def module(seed: int = 0, **options: Any) -> ShardDataModule:
        padding = MixedPadding(0.3, seed)
        return data_module(tiny_shards, build, padding=padding, samples_per_epoch=180, **options)

    whole = padded(module().train_dataloader())
    assert keys_of(
        [*data_module(tiny_shards, build, samples_per_epoch=180).train_dataloader()]
    ) == [tuple(key for key, _ in whole[start : start + 3]) for start in range(0, 180, 3)]
    drawn = [is_padded for _, is_padded in whole]
    assert 0.2 < np.mean(drawn) < 0.4
    assert padded(module(workers=2).train_dataloader()) == whole
    ranks = [list(module().train_stream(rank, 2, Cursor(), None, 30)) for rank in (0, 1)]
    assert padded(batch for pair in zip(*ranks, strict=True) for batch in pair) == whole
    rest = module().train_dataloader()
    rest.cursor = Cursor(30)
    assert padded(islice(rest, 5)) == whole[30:45]
    assert [pads for _, pads in padded(module(seed=1).train_dataloader())] != drawn
    assert not any(pads for _, pads in padded(module().val_dataloader()))


@pytest.mark.parametrize("partitions", [1, 3])
def test_batches_of_seconds_count_padded_clips_as_30_s(
    tiny_shards: Path, build: ExampleBuilder, partitions: int
):
    module = data_module(
        tiny_shards,
        build,
        padding=MixedPadding(0.2, 0),
        partitions=partitions,
        batch_seconds=100.0,
        samples_per_epoch=500,
    )
    batches = list(module.train_dataloader())
    seconds = [
        sum(30.0 if pads else f / 100 for f, pads in zip(b.mel_lengths, b.padded, strict=True))
        for b in batches
    ]
    assert len(batches) > 20
    assert max(seconds) < 100.5  # the shards have lengths in whole milliseconds, mels whole frames
    assert np.mean(seconds) > 75
    assert any(True in batch.padded for batch in batches)


TEXT = "a dog barks twice, far away; then a door slams and somebody laughs in the next room"


def captioned(folder: Path, field: str, seconds: float) -> ShardIndex:
    """Write clips whose captions, of 1 to 17 words, are in a field of the JSON."""
    audio, random = encode_audio(tone(seconds)), np.random.default_rng(1)
    with ShardWriter(folder, max_bytes=8 * len(audio)) as shards:
        for number in range(60):
            text = " ".join(TEXT.split()[: int(random.integers(1, 17))])
            annotation = Annotation(duration_seconds=seconds, extra={field: text})
            shards.write(str(number), "flac", audio, annotation)
    index_folder(folder)  # counts the bytes of texts in the fields of the usual names
    mapping = FieldMapping({"text": field})
    return replace(open_index(folder), mapping=mapping)


@pytest.mark.parametrize("field", ["caption", "a field that tables do not know"])
def test_batches_keep_a_limit_of_tokens_next_to_that_of_seconds(
    field: str, tmp_path: Path, build: ExampleBuilder
):
    sources = [
        StreamSource(captioned(tmp_path / str(seconds), field, seconds), "sound")
        for seconds in (0.1, 3.0)
    ]

    def batches(**options: Any) -> list[Batch]:
        options = {"seed": 0, "window": 50, "batch_clips": 1, "batch_seconds": 30.0, **options}
        module = ShardDataModule(sources, [], [1, 1], build, epochs=1, **options)
        return list(module.train_dataloader())

    def tokens(found: list[Batch]) -> list[int]:
        return [len(batch.targets.tokens) for batch in found]

    unlimited, limited = batches(), batches(batch_tokens=260)
    assert max(tokens(unlimited)) > 260
    assert max(tokens(limited)) <= 260
    assert max(sum(batch.mel_lengths) for batch in limited) <= 3_000
    assert np.mean(tokens(limited)) > (180 if field == "caption" else 100)
    assert sorted(key for batch in limited for key in batch.keys) == sorted(
        key for batch in unlimited for key in batch.keys
    )
    by_partitions = batches(batch_tokens=260, partitions=2)
    assert max(tokens(by_partitions)) <= 260
    assert keys_of(batches(batch_tokens=100_000)) == keys_of(unlimited)
    # A clip with more tokens than the limit is a batch of its own.
    assert max(len(batch) for batch in batches(batch_tokens=1)) == 1


def test_tables_without_the_lengths_of_texts_serve_all_but_a_limit_of_tokens(
    tmp_path: Path, build: ExampleBuilder
):
    index = captioned(tmp_path, "caption", 0.1)
    for shard in index.shards:
        table = tmp_path / table_name(shard.name)
        np.save(table, np.load(table)[:, :4])
    options: dict[str, Any] = {"seed": 0, "window": 50, "batch_clips": 1, "batch_seconds": 30.0}
    sources = [StreamSource(open_index(tmp_path), "sound")]
    module = ShardDataModule(sources, [], [1], build, epochs=1, **options)
    assert sum(map(len, module.train_dataloader())) == 60
    with pytest.raises(UserError, match=r"the lengths of texts\. .*whisper-aut data index"):
        ShardDataModule(sources, [], [1], build, batch_tokens=260, **options)


def test_another_order_refuses_the_position(tiny_shards: Path, build: ExampleBuilder):
    state = data_module(tiny_shards, build).train_dataloader().state_dict()
    with pytest.raises(
        UserError, match="other training data, exclusions, weights, seed, window or"
    ):
        data_module(tiny_shards, build, seed=1).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize("epochs", [None, 2])
@pytest.mark.parametrize("batches", [{"batch_clips": 2}, {"batch_seconds": 40.0}])
def test_other_batches_begin_after_those_that_were_planned_together(
    tiny_shards: Path, build: ExampleBuilder, batches: dict[str, Any], epochs: int | None
):
    options: dict[str, Any] = {"partitions": 4, "epochs": epochs, "samples_per_epoch": 600}
    before = data_module(tiny_shards, build, **options)
    loader = before.train_dataloader()
    for _ in islice(loader, 6):
        pass
    state = loader.state_dict()
    assert (state["position"], state["taken"]) == (3, 2)

    def resumed(**changes: Any) -> ShardDataModule:
        module = data_module(tiny_shards, build, **options, **batches)
        assert module.resume(1, state, 6, **changes) == Cursor(6)
        return module

    with pytest.raises(UserError, match=r"planned together with another .*--allow-data-change"):
        resumed()
    after = resumed(allow_change=True)
    assert after.position == 6
    # As the callback that writes checkpoints does.
    loader = after.train_dataloader()
    loader.load_state_dict(state | Cursor(6)._asdict())
    straight = data_module(tiny_shards, build, **options, **batches)
    end = straight.order.epoch_clips
    rest = straight.train_stream(0, 1, Cursor(6), end, len(list(islice(loader, 5))))
    loader.load_state_dict(state | Cursor(6)._asdict())
    assert keys_of(list(islice(loader, 5))) == keys_of(list(islice(rest, 5)))


def test_one_epoch_of_one_source_is_every_clip_once(tiny_shards: Path, build: ExampleBuilder):
    loader = data_module(tiny_shards, build, ("music",), samples_per_epoch=None).train_dataloader()
    seen = Counter(key for batch in loader for key in batch.keys)
    assert len(seen) == 9
    assert set(seen.values()) == {1}


def test_ranks_share_each_batch_without_overlap(tiny_shards: Path, build: ExampleBuilder):
    whole = keys_of(list(data_module(tiny_shards, build, batch_clips=6).train_dataloader()))
    module = data_module(tiny_shards, build)
    ranks = [keys_of(list(module.train_stream(rank, 2, Cursor(), None, 6))) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


def test_validation_gives_every_clip_once_and_every_rank_the_same_steps(
    tiny_shards: Path, build: ExampleBuilder
):
    module = data_module(tiny_shards, build)
    assert sum(len(batch) for batch in module.val_dataloader()) == 43
    ranks = [list(module.valid_stream(rank, 2)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert sum(len(batch) for rank in ranks for batch in rank) == 43


def test_the_validation_worker_ends_with_the_last_batch(tiny_shards: Path, build: ExampleBuilder):
    loader = data_module(tiny_shards, build, workers=2).val_dataloader()
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    taken = [next(batches) for _ in range(len(loader) - 1)]
    assert len(set(multiprocessing.active_children()) - before) == 1
    taken.append(next(batches))  # Lightning asks for no more, and keeps `batches`
    assert not set(multiprocessing.active_children()) - before
    assert sum(len(batch) for batch in taken) == 43


def test_no_more_than_a_limit_is_read_ahead(
    tmp_path: Path, build: ExampleBuilder, monkeypatch: pytest.MonkeyPatch
):
    """What has not been read when the first batch is out is missed once its tars are gone."""
    folder = write_shards(tmp_path / "sound", 24, "sound", per_shard_bytes=1)  # a clip a tar
    bytes_of_clip = open_index(folder).sample_bytes
    monkeypatch.setattr(dataset, "AHEAD_BYTES", 6 * bytes_of_clip)
    batches = iter(data_module(tmp_path, build, ("sound",), window=6).val_dataloader())
    first = next(batches)
    for tar in folder.glob("*.tar"):
        tar.unlink()
    rest = list(batches)
    assert len(first) + sum(len(batch) for batch in rest) <= 3 + 6
    assert sum(len(batch.skipped) for batch in rest) >= 15


def test_accumulated_batches_know_the_tokens_of_their_step(
    tiny_shards: Path, build: ExampleBuilder
):
    batches = list(data_module(tiny_shards, build, accumulate=3).train_dataloader())
    for step in (batches[i : i + 3] for i in range(0, 12, 3)):
        assert {batch.step_weight for batch in step} == {
            sum(sum(batch.targets.counts) for batch in step)
        }


def test_an_epoch_follows_one_whose_batches_were_counted_and_not_exhausted(
    tiny_shards: Path, build: ExampleBuilder
):
    loader = data_module(tiny_shards, build).train_dataloader()
    epochs = [list(islice(iter(loader), len(loader))) for _ in range(3)]  # as Lightning does
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 3
    straight = data_module(tiny_shards, build).train_dataloader()
    assert keys_of([batch for epoch in epochs for batch in epoch]) == keys_of(
        [batch for _ in range(3) for batch in straight]
    )


def test_an_epoch_smaller_than_a_step_is_a_clear_error(tiny_shards: Path, build: ExampleBuilder):
    with pytest.raises(UserError, match=r"is shorter than one step.*data\.batch_clips"):
        data_module(tiny_shards, build, samples_per_epoch=2).train_dataloader()


class Leg:
    """A run on a number of ranks, without its audio: from the start or from where another leg
    stopped.
    """

    def __init__(
        self,
        root: Path,
        build: ExampleBuilder,
        ranks: int,
        before: "Leg | None" = None,
        **options: Any,
    ):
        self.module = data_module(root, build, **options)
        self.ranks, self.step, self.epochs = (
            ranks,
            before.step if before else 0,
            options.get("epochs", 1),
        )
        if before:
            self.module.resume(ranks, before.loader.state_dict(), before.step)
        self.plan = self.module.total_steps(ranks, self.epochs)
        self.module._rank_and_ranks = lambda: (0, ranks)
        self.loader = self.module.train_dataloader()
        if before:
            self.loader.load_state_dict(before.loader.state_dict())

    def take(self, steps: int) -> "Leg":
        order = self.module.order
        for _ in range(steps):
            clips = order.epoch_clips
            end = (self.loader.cursor.position // clips + 1) * clips if clips else None
            *_, (_, self.loader.cursor) = islice(
                batches_from(self.module.batching, self.loader.cursor, end), self.ranks
            )
        self.step += steps
        return self


@pytest.mark.parametrize(
    "worlds", [(4, 2, 2, 2), (2, 4, 4, 4), (4, 2, 1, 1), (1, 2, 4, 1)], ids=str
)
@pytest.mark.parametrize("mode", ["mixture", "epochs"])
def test_a_run_that_changes_its_ranks_again_and_again_reads_its_epochs_and_no_more(
    tiny_shards: Path, build: ExampleBuilder, mode: str, worlds: tuple[int, ...]
):
    """Steps measured in seconds have the size of their ranks. A leg in the same world keeps the
    plan of the one before.
    """
    build = replace(build, limits=ClipLimits(max_seconds=3.0))
    of_mode = {"epochs": 3} if mode == "epochs" else {"samples_per_epoch": 600}
    options: dict[str, Any] = {"batch_seconds": 5.0, **of_mode}
    leg = Leg(tiny_shards, build, worlds[0], **options)
    for ranks in worlds[1:]:
        before = leg.take((leg.plan - leg.step) // 3)
        leg = Leg(tiny_shards, build, ranks, before, **options)
        assert leg.ranks != before.ranks or leg.plan == before.plan
    leg.take(leg.plan - leg.step)
    if mode == "epochs":
        assert leg.loader.cursor == (3 * 43, 0)
    else:
        clips = 5.0 / leg.module.batching.mean_seconds  # pyright: ignore[reportAttributeAccessIssue]
        read = leg.loader.cursor.position + leg.loader.cursor.taken * clips
        assert read == pytest.approx(600, abs=4 * clips + 0.1 * 600)


def test_steps_end_with_the_data_that_a_rewind_has_left(tiny_shards: Path, build: ExampleBuilder):
    leg = Leg(tiny_shards, build, 1, epochs=2).take(4)
    leg.module.resume(1, leg.loader.state_dict(), leg.step, skip_to=Cursor(30))
    assert leg.module.total_steps(1, 2) == 4 + 5 + 15, (
        "13 clips of the first epoch are left, and the second"
    )


def faulty_shards(folder: Path) -> Path:
    """One good clip and one of each fault, in one shard."""
    good = Annotation(text="fine", domain="sound")
    nan = tone(1.0)
    nan[10] = np.nan
    bodies = {
        "good": ("flac", encode_audio(tone(1.0)), good),
        "stereo48k": (
            "wav",
            encode_audio(np.stack([tone(1.0, 440, 48_000)] * 2, 1), 48_000, "WAV"),
            good,
        ),
        "not_audio": ("wav", b"this is a text file", good),
        "no_samples": ("wav", encode_audio(np.zeros(0, np.float32), kind="WAV"), good),
        "nan": ("wav", encode_audio(nan, kind="WAV", subtype="FLOAT"), good),
        "too_long": ("flac", encode_audio(np.tile(tone(1.0), 31)), good),
        "too_short": ("flac", encode_audio(tone(0.05)), good),
        "silent": ("flac", encode_audio(np.zeros(16_000, np.float32)), good),
        "phases": (
            "flac",
            encode_audio(np.stack([tone(1.0), -tone(1.0)], 1), kind="FLAC"),
            good,
        ),
        "integers": (
            "wav",
            encode_audio(tone(1.0) * 32_767, kind="WAV", subtype="FLOAT"),
            good,
        ),
        "joined": ("ogg", encode_audio(tone(1.0), kind="OGG") * 2, good),
        "no_text": ("flac", encode_audio(tone(1.0)), Annotation(domain="sound")),
    }
    with ShardWriter(folder) as shards:
        for key, (suffix, audio, annotation) in bodies.items():
            shards.write(key, suffix, audio, annotation)
    return folder


def test_every_fault_is_refused_under_its_own_reason(tmp_path: Path, build: ExampleBuilder):
    faulty_shards(tmp_path / "sound")
    batches = list(data_module(tmp_path, build, ("sound",), batch_clips=4).val_dataloader())
    assert sorted(key for batch in batches for key in batch.keys) == ["good", "stereo48k"]
    reasons = {refusal.key: refusal.reason for batch in batches for refusal in batch.skipped}
    assert reasons == {
        "not_audio": SkipReason.UNDECODABLE,
        "no_samples": SkipReason.EMPTY,
        "nan": SkipReason.NON_FINITE,
        "too_long": SkipReason.TOO_LONG,
        "too_short": SkipReason.TOO_SHORT,
        "silent": SkipReason.SILENT,
        "phases": SkipReason.SILENT,
        "integers": SkipReason.OUT_OF_SCALE,
        "joined": SkipReason.JOINED,
        "no_text": SkipReason.NO_TEXT,
    }


@pytest.mark.parametrize(
    ("text", "expected"), [("title", "rain"), ("{title:words}, by {artist}", "rain, by x")]
)
def test_a_source_may_name_the_field_that_holds_its_text(
    tmp_path: Path, build: ExampleBuilder, text: str, expected: str
):
    with ShardWriter(tmp_path / "sound") as shards:
        fields = {"title": "rain", "artist": "x"}
        shards.write("a", "flac", encode_audio(tone(1.0)), Annotation(extra=fields))
    batches = []
    for template in (text, ""):
        settings = SourceSettings(str(tmp_path / "sound"), "sound", text=template)
        sources = open_sources([settings], ReadPolicy())
        options = {"seed": 0, "window": 6, "batch_clips": 1, "samples_per_epoch": 1}
        batches += ShardDataModule(sources, sources, [1.0], build, **options).val_dataloader()
    assert list(batches[0].texts) == [expected]
    (refusal,) = batches[1].skipped
    assert refusal.reason is SkipReason.NO_TEXT
    assert refusal.detail == "its fields: artist, title; data.train[].text names the one to read"


def test_a_batch_of_nothing_but_faults_is_still_a_batch(tmp_path: Path, build: ExampleBuilder):
    with ShardWriter(tmp_path / "sound") as shards:
        for number in range(3):
            shards.write(f"bad{number}", "wav", b"no", Annotation(text="x", domain="sound"))
    batches = list(data_module(tmp_path, build, ("sound",), samples_per_epoch=6).train_dataloader())
    assert [len(batch) for batch in batches] == [0, 0]
    assert sum(len(batch.skipped) for batch in batches) == 6


def test_a_shard_without_json_and_a_truncated_tar_cost_only_their_samples(
    tmp_path: Path, build: ExampleBuilder
):
    folder = write_shards(tmp_path / "sound", 8, "sound", per_shard_bytes=1 << 30)
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 6 // 10])
    batches = list(data_module(tmp_path, build, ("sound",)).val_dataloader())
    skipped = [refusal for batch in batches for refusal in batch.skipped]
    assert sum(len(batch) for batch in batches) + len(skipped) == 8
    assert {refusal.reason for refusal in skipped} <= {SkipReason.BAD_TAR, SkipReason.BAD_JSON}
    assert 3 <= sum(len(batch) for batch in batches) <= 6

    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        tar.add(folder / "index.json", "a.wav")
    (tmp_path / "bare").mkdir()
    (tmp_path / "plain.tar").rename(tmp_path / "bare" / "x.tar")
    (batch,) = data_module(tmp_path, build, ("bare",)).val_dataloader()
    assert [refusal.reason for refusal in batch.skipped] == [SkipReason.BAD_JSON]


def test_a_shard_that_vanishes_during_the_run_is_counted(tmp_path: Path, build: ExampleBuilder):
    write_shards(tmp_path / "sound", 8, "sound")
    module = data_module(tmp_path, build, ("sound",))
    for shard in (tmp_path / "sound").glob("*.tar"):
        shard.unlink()
    batches = list(module.val_dataloader())
    assert [refusal.reason for batch in batches for refusal in batch.skipped] == [
        SkipReason.BAD_TAR
    ] * 8


def test_sources_of_a_domain_count_by_clips_or_by_hours():
    one = ShardIndex("one", (ShardEntry("a.tar", 30, 60.0),))
    two = ShardIndex("two", (ShardEntry("a.tar", 10, 180.0),))
    sources = [SourceSettings("one", "sound"), SourceSettings("two", "sound")]
    domains = {"speech": 0.0, "sound": 1.0, "music": 0.0}
    by_clips = DataSettings(train=sources, domains=domains)
    by_hours = DataSettings(train=sources, domains=domains, weigh_by="hours")
    assert source_weights(by_clips, [one, two], domains) == [0.75, 0.25]
    assert source_weights(by_hours, [one, two], domains) == [0.25, 0.75]
    unknown = ShardIndex("two", (ShardEntry("a.tar", 10),))
    with pytest.raises(UserError, match="the lengths of two are not known"):
        source_weights(by_hours, [one, unknown], domains)


def test_tars_of_clips_of_other_lengths_cause_a_warning_about_emptier_batches(
    tmp_path: Path, build: ExampleBuilder, caplog: pytest.LogCaptureFixture
):
    def shards(name: str, seconds: list[float]) -> ShardIndex:
        with ShardWriter(tmp_path / name) as out:
            for number in range(64):
                length = seconds[number % len(seconds)]
                out.write(str(number), "flac", b"", Annotation("a", duration_seconds=length))
                if number % 16 == 15:
                    out.finish_tar()
        return open_index(tmp_path / name)

    for name, seconds in (("even", [1.0, 9.0]), ("odd", [1.0] * 32 + [9.0] * 32)):
        source = StreamSource(shards(name, seconds), "sound")
        options: dict[str, Any] = {"seed": 0, "window": 4, "batch_clips": 1, "epochs": 1}
        module = ShardDataModule(
            [source], [], [1], build, partitions=4, batch_seconds=30.0, **options
        )
        module.train_dataloader()
        assert ("use only 44%" in caplog.text) == (name == "odd")  # 320 s in 24 batches of 30 s
