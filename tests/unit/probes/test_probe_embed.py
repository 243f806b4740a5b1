"""probes.embed: features are those of each clip alone, nothing is dropped without a count, nothing
stale is read.
"""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from webdataset.writer import TarWriter

from tests.support.probes import embed_task
from whisper_aut.audio.decode import ClipLimits, load_waveform
from whisper_aut.audio.windows import POOLINGS, cut_windows, join_windows
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.probes import embed
from whisper_aut.probes.embed import EmbedSettings, segment_borders
from whisper_aut.probes.encoders import LogMelBaseline

QUIET = EmbedSettings(quiet=True, batch_seconds=1.5)


def test_features_are_those_of_each_clip_alone_in_shard_order(
    tones, task_with, tiny_encoder, tmp_path
):
    found = embed_task(tiny_encoder(), task_with(), tones, tmp_path, QUIET)["train"]
    samples = list(iter_samples(open_index(tones / "tones" / "train"), ClipLimits()))
    assert len(found) == len(samples) == 48
    assert len(open_index(tones / "tones" / "train").shards) > 1
    for sample, label, key, row in zip(
        samples, found.labels, found.keys, found.features, strict=True
    ):
        assert isinstance(sample, Sample)
        assert label == sample.annotation.label
        assert key.endswith(":" + sample.key)
        frames = tiny_encoder().encode([load_waveform(sample.audio, ClipLimits())], 16_000)[0]
        torch.testing.assert_close(row, frames.mean(0), atol=1e-5, rtol=1e-5)


def test_batching_does_not_change_the_result(tones, task_with, tiny_encoder, tmp_path):
    padded = tiny_encoder()
    padded.padding = "30s"
    one = embed_task(tiny_encoder(), task_with(), tones, tmp_path / "a", EmbedSettings(quiet=True))[
        "test"
    ]
    other = embed_task(
        padded, task_with(), tones, tmp_path / "b", EmbedSettings(quiet=True, batch_seconds=0.2)
    )["test"]
    torch.testing.assert_close(one.features, other.features, atol=1e-5, rtol=1e-5)
    assert one.keys == other.keys


def test_pooling_is_a_setting_or_the_encoders_own(tones, task_with, tiny_encoder, tmp_path):
    requested = embed_task(
        tiny_encoder(), task_with(), tones, tmp_path, EmbedSettings(pooling="mean_std", quiet=True)
    )
    assert requested["test"].features.shape == (30, 24)
    own = embed_task(LogMelBaseline(), task_with(), tones, tmp_path, QUIET)
    assert own["test"].features.shape == (30, 160)
    frames = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert POOLINGS["mean_std"](frames).tolist() == [2.0, 4.0, 1.0, 2.0]
    with pytest.raises(UserError, match="mean_std"):
        EmbedSettings(pooling="max")


def test_the_second_time_nothing_is_encoded(tones, task_with, tiny_encoder, tmp_path):
    first, second = tiny_encoder(), tiny_encoder()
    one, other = (embed_task(e, task_with(), tones, tmp_path, QUIET) for e in (first, second))
    assert (first.encoded, second.encoded) == (48 + 24 + 30, 0)
    for split in one:
        assert torch.equal(one[split].features, other[split].features)
        assert (one[split].labels, one[split].keys) == (other[split].labels, other[split].keys)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_another_task_shares_the_folders(tones, task_with, tiny_encoder, tmp_path):
    embed_task(tiny_encoder(), task_with(), tones, tmp_path, QUIET)
    swapped = tiny_encoder()
    embed_task(
        swapped,
        task_with(name="swapped", train=["{root}/tones/valid"], valid=["{root}/tones/train"]),
        tones,
        tmp_path,
        QUIET,
    )
    assert swapped.encoded == 0


@pytest.mark.parametrize("change", ["encoder", "pooling", "label", "select"])
def test_whatever_changes_is_computed_again(tones, task_with, tiny_encoder, tmp_path, change):
    embed_task(tiny_encoder(), task_with(), tones, tmp_path, QUIET)
    encoder = tiny_encoder(seed=1 if change == "encoder" else 0)
    task = task_with(
        **{"label": {"label": "pitch"}, "select": {"select": {"half": ["0", "1"]}}}.get(change, {})
    )
    settings = {
        "pooling": EmbedSettings(pooling="mean_std", quiet=True),
    }
    embed_task(encoder, task, tones, tmp_path, settings.get(change, QUIET))
    assert encoder.encoded == 102


@pytest.mark.parametrize("with_index", [True, False])
def test_changed_shards_are_embedded_again(
    task_with, tiny_encoder, write_shards, tmp_path, with_index
):
    task = task_with(train=["{root}/a"], valid=[], test=["{root}/b"])
    for seed in (0, 1):
        for name in ("a", "b"):
            # The second time round, a holds as many clips as before, of other audio.
            write_shards(tmp_path / name, 3, seed=7 + seed if name == "a" else 9)
            if not with_index:
                (tmp_path / name / "index.json").unlink()
        encoder = tiny_encoder()
        embed_task(encoder, task, tmp_path, tmp_path / "cache", QUIET)
        assert encoder.encoded >= (9 if seed else 18)
    if with_index:
        assert encoder.encoded == 9


@pytest.mark.parametrize("damage", ["truncate", "flip", "text", "empty"])
def test_a_damaged_cache_is_computed_again(tones, task_with, tiny_encoder, tmp_path, damage):
    whole = embed_task(tiny_encoder(), task_with(), tones, tmp_path, QUIET)
    for path in tmp_path.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x40
        path.write_bytes(
            {"truncate": data[:-40], "flip": data, "text": b"not safetensors", "empty": b""}[damage]
        )
    encoder = tiny_encoder()
    again = embed_task(encoder, task_with(), tones, tmp_path, QUIET)
    assert encoder.encoded == 102
    assert torch.equal(whole["train"].features, again["train"].features)


def test_unselected_and_unlabelled_clips_are_counted_as_skipped(
    tones, task_with, tiny_encoder, tmp_path
):
    found = embed_task(tiny_encoder(), task_with(select={"half": [0]}), tones, tmp_path, QUIET)[
        "test"
    ]
    assert (len(found), found.skipped) == (15, {"not selected": 15})
    nothing = embed_task(tiny_encoder(), task_with(label="genre"), tones, tmp_path, QUIET)["test"]
    assert (len(nothing), nothing.skipped) == (0, {"no label": 30})


@pytest.mark.parametrize("nothing", ["NaN", "null", '" "', "[]", "[NaN]"])
@pytest.mark.parametrize("field", ["label", "genre"])
def test_a_nan_is_no_class(task_with, field: str, nothing: str):
    annotation = Annotation.from_json(f'{{"text": "t", "{field}": {nothing}}}'.encode())
    assert task_with(label=field).label_of(annotation) is None


@pytest.mark.parametrize(
    ("task", "fields", "label"),
    [
        ({"label": "caption*"}, {"captions": ["a dog", "a bark", None]}, ("a dog", "a bark")),
        ({"label": "text"}, {"text": ["a dog", "a bark"]}, ("a dog", "a bark")),
        ({"label": "tags"}, {"tags": ["dog", None]}, ("dog",)),
        ({"label": "events"}, {"events": [{"onset": 0, "offset": 1, "label": None}]}, ()),
        ({"label": "events"}, {"events": []}, ()),
        ({"label": "genre"}, {"genre": ["rock", ""]}, "rock"),
    ],
)
def test_the_items_of_lists_are_values_and_null_is_none(task_with, task, fields, label):
    metrics = {"tags": "mAP", "events": "segment_f1_macro", "genre": "accuracy"}
    metric = metrics.get(task["label"], "recall@1")
    seconds = {"segment_seconds": 1.0} if task["label"] == "events" else {}
    annotation = Annotation.from_json(json.dumps(fields).encode())
    assert task_with(metric=metric, **task, **seconds).label_of(annotation) == label


@pytest.mark.parametrize(
    "times", [(2.0, 1.0), ("NaN", 1.0), (0.0, "NaN"), (None, 1.0), (0.0, "inf")]
)
def test_an_event_that_ends_before_it_begins_or_never_is_an_error(task_with, times):
    task = task_with(label="events", metric="segment_f1_macro", segment_seconds=1.0)
    event = {"onset": times[0], "offset": times[1], "label": "dog"}
    with pytest.raises(UserError, match="onset and a later offset"):
        task.label_of(Annotation.from_json(json.dumps({"events": [event]}).encode()))


@pytest.fixture
def train_only(task_with, write_shards, tmp_path):
    """A task whose training folder is the test's to write; its test folder is whole."""
    write_shards(tmp_path / "b", 2, seed=99)
    return task_with(train=["{root}/a"], valid=[], test=["{root}/b"])


def _shards_with_broken(folder: Path, whole: int, broken: int) -> None:
    with ShardWriter(folder) as shards:
        for number in range(whole + broken):
            file = io.BytesIO()
            wave = np.random.default_rng(number).uniform(-0.1, 0.1, 3_200).astype(np.float32)
            soundfile.write(file, wave, 16_000, format="WAV")
            audio = file.getvalue() if number < whole else b"this is no audio"
            shards.write(f"{number}", "wav", audio, Annotation(label=str(number % 2)))


def test_broken_audio_is_counted_by_reason(task_with, tiny_encoder, tmp_path):
    _shards_with_broken(tmp_path / "a", whole=60, broken=1)
    task = task_with(train=["{root}/a"], valid=[], test=["{root}/a2"])
    _shards_with_broken(tmp_path / "a2", whole=61, broken=0)
    found = embed_task(tiny_encoder(), task, tmp_path, tmp_path / "cache", QUIET)
    assert (len(found["train"]), found["train"].skipped) == (60, {"undecodable audio": 1})
    again = embed_task(tiny_encoder(), task, tmp_path, tmp_path / "cache", QUIET)
    assert again["train"].skipped == {"undecodable audio": 1}


def test_too_much_broken_audio_is_fatal(train_only, tiny_encoder, tmp_path):
    _shards_with_broken(tmp_path / "a", whole=20, broken=5)
    with pytest.raises(UserError, match=r"5 of 25 samples cannot be used .5 × undecodable audio"):
        embed_task(tiny_encoder(), train_only, tmp_path, tmp_path / "cache", QUIET)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_damaged_tar_is_fatal_however_few_clips_it_loses(
    train_only, tiny_encoder, write_shards, tmp_path
):
    write_shards(tmp_path / "a", 20, seed=0)
    last = sorted((tmp_path / "a").glob("*.tar"))[-1]
    last.write_bytes(last.read_bytes()[:-12_000])
    with pytest.raises(UserError, match="bad tar"):
        embed_task(tiny_encoder(), train_only, tmp_path, tmp_path / "cache", QUIET)


def test_a_tar_in_two_splits_is_an_error(task_with, tiny_encoder, write_shards, tmp_path):
    for name in ("a", "b"):
        write_shards(tmp_path / name, 2, seed=0)
    with pytest.raises(UserError, match="of 'test' is in 'train' too"):
        embed_task(
            tiny_encoder(),
            task_with(train=["{root}/a"], valid=[], test=["{root}/b"]),
            tmp_path,
            tmp_path / "cache",
            QUIET,
        )


def test_two_labels_on_a_clip_are_an_error(train_only, tiny_encoder, write_shards, tmp_path):
    write_shards(tmp_path / "a", 2, seed=0, label=["dog", "cat"])
    with pytest.raises(UserError, match="dog, cat"):
        embed_task(tiny_encoder(), train_only, tmp_path, tmp_path / "cache", QUIET)


def test_frames_that_are_not_finite_name_the_clip(tones, task_with, tiny_encoder, tmp_path):
    encoder = tiny_encoder()
    encoder.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"not finite for 48 of 48 clips.*clip0"):
        embed_task(encoder, task_with(), tones, tmp_path, QUIET)


def test_a_cache_that_cannot_be_written_is_an_error(tones, task_with, tiny_encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        embed_task(tiny_encoder(), task_with(), tones, tmp_path / "file", QUIET)


@pytest.mark.parametrize("view", ["pooled", "frames"])
def test_an_interrupted_run_resumes_after_its_last_part(
    view, tones, task_with, tiny_encoder, tmp_path, monkeypatch
):
    def embedded(encoder, cache, settings):
        return embed_task(encoder, task_with(), tones, cache, settings, kind=view)["train"]

    whole = embedded(tiny_encoder(), tmp_path / "whole", QUIET)
    monkeypatch.setattr(embed, "PART_SECONDS", 0.0)
    dying = tiny_encoder()

    def encode(waveforms, sample_rate_hz, layers, batch_seconds):
        if dying.encoded > 36:
            raise KeyboardInterrupt
        return tiny_encoder.encode(dying, waveforms, sample_rate_hz)

    dying.encode = encode
    small = EmbedSettings(quiet=True, batch_seconds=0.5)
    with pytest.raises(KeyboardInterrupt):
        embedded(dying, tmp_path / "cut", small)
    parts = list((tmp_path / "cut").glob("*.part-*"))
    assert parts
    resumed = tiny_encoder()
    found = embedded(resumed, tmp_path / "cut", small)
    assert resumed.encoded < 102
    assert (found.keys, found.labels) == (whole.keys, whole.labels)
    torch.testing.assert_close(found.features, whole.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.frames, whole.frames, atol=1e-5, rtol=1e-5)
    assert bool(found.frames) == (view == "frames")
    assert not list((tmp_path / "cut").glob("*.part-*"))


def test_no_clip_is_read_twice_after_a_damaged_part(
    tones, task_with, tiny_encoder, tmp_path, monkeypatch
):
    def embedded(encoder, batch_seconds):
        settings = EmbedSettings(quiet=True, batch_seconds=batch_seconds)
        return embed_task(encoder, task_with(), tones, tmp_path, settings)["train"]

    monkeypatch.setattr(embed, "PART_SECONDS", 0.0)
    dying = tiny_encoder()

    def encode(waveforms, sample_rate_hz, layers, batch_seconds):
        if dying.encoded > 36:
            raise KeyboardInterrupt
        return tiny_encoder.encode(dying, waveforms, sample_rate_hz)

    dying.encode = encode
    with pytest.raises(KeyboardInterrupt):
        embedded(dying, 0.5)
    first, second, *_ = sorted(tmp_path.glob("*.part-*"))
    assert second.exists()
    first.write_bytes(first.read_bytes()[:-1])
    found = embedded(tiny_encoder(), 1.0)  # in fewer parts than before
    assert len(found) == len(set(found.keys)) == 48
    assert not list(tmp_path.glob("*.part-*"))


def test_names_that_are_not_utf_8_are_escaped(task_with, tiny_encoder, write_shards, tmp_path):
    folders = {part: [str(tmp_path / part)] for part in ("train", "valid", "test")}
    for seed, part in enumerate(folders):
        write_shards(tmp_path / part, 2, seed)
        (tar,) = (tmp_path / part).glob("*.tar")
        with tarfile.open(tar) as source, tarfile.open(tmp_path / part / "a.tar", "w") as target:
            for member in source:
                file = source.extractfile(member)
                member.name = member.name.replace("clip", "caf\udce9")
                target.addfile(member, file)
        for path in {*(tmp_path / part).iterdir()} - {tmp_path / part / "a.tar"}:
            path.unlink()
    encoder, task = tiny_encoder(), task_with(**folders, group="key")
    found = embed_task(encoder, task, None, tmp_path / "cache", QUIET)["test"]
    assert (found.keys[0], found.groups[0]) == ("a.tar:caf\\udce90", "caf\\udce90")
    embed_task(encoder, task, None, tmp_path / "cache", QUIET)
    assert encoder.encoded == 18  # the cache was read the second time


def test_processes_that_share_a_cache_embed_each_folder_once(
    tones, task_with, tiny_encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(embed, "PART_SECONDS", 0.0)
    small = EmbedSettings(quiet=True, batch_seconds=0.5)
    encoders = [tiny_encoder(), tiny_encoder()]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda one: embed_task(one, task_with(), tones, tmp_path, small), encoders)
        assert [len(parts["train"]) for parts in found] == [48, 48]
    assert sum(encoder.encoded for encoder in encoders) == 102


def test_windows_of_long_clips_count_each_instant_once():
    waveform = torch.randn(75 * 16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    cut = cut_windows(waveform)
    assert [len(piece) / 16_000 for piece in cut] == [30, 30, 19]
    encoder = LogMelBaseline()
    joined = join_windows(encoder.encode(cut, 16_000))
    assert joined.shape == (7_500, 80)
    middle = encoder.encode([waveform[20 * 16_000 : 50 * 16_000]], 16_000)[
        0
    ]  # across the first seam
    assert (joined[2_100:4_900] - middle[100:2_900]).abs().median() < 1e-4


def test_windows_with_few_frames_keep_them():
    """Such as the single vector that some encoders of users return."""
    windows = [torch.full((1, 2), float(number)) for number in range(3)]
    assert join_windows(windows).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_segments_cover_a_clip_and_none_is_empty():
    assert segment_borders(101, 0.02, 1.0) == [(0, 50), (50, 100), (100, 101)]
    assert segment_borders(3, 0.02, 0.1) == [(0, 3)]
    assert segment_borders(10, 0.02, 0.01) == [(i // 2, i // 2 + 1) for i in range(20)]


def test_a_crop_keeps_the_beginning_of_each_clip(tones, task_with, tiny_encoder, tmp_path):
    task = task_with(crop_seconds=0.2)
    found = embed_task(tiny_encoder(), task, tones, tmp_path, QUIET, kind="frames")["test"]
    assert max(len(clip) for clip in found.frames) == 20
    assert len(found) == 30


def test_a_crop_lets_clips_pass_that_are_a_little_too_long(task_with, tiny_encoder, tmp_path):
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name) as shards:
            for number in range(3):
                file = io.BytesIO()
                wave = (
                    np.random.default_rng([number, *name.encode()])
                    .uniform(-0.1, 0.1, int(30.013 * 16_000))
                    .astype(np.float32)
                )
                soundfile.write(file, wave, 16_000, format="FLAC")
                shards.write(
                    f"{number}", "flac", file.getvalue(), Annotation(label=str(number % 2))
                )
    task = task_with(train=["{root}/a"], valid=[], test=["{root}/b"], crop_seconds=30)
    found = embed_task(tiny_encoder(), task, tmp_path, tmp_path / "cache", QUIET)
    assert (len(found["train"]), found["train"].skipped) == (3, {})


def test_tars_of_x_ares_are_read_by_pattern_and_by_their_own_keys(
    task_with, tiny_encoder, tmp_path
):
    events = [{"onset": 0.0, "offset": 0.1, "label": "Dog,Speech"}]
    facts = {"a": {"genre": "jazz"}, "b": {"soundevent": "Dog;Bark"}, "c": events}
    for name, fact in facts.items():
        with TarWriter(str(tmp_path / f"wds-{name}-00.tar")) as tar:
            for number in range(2):
                file = io.BytesIO()
                wave = np.random.default_rng(number).uniform(-0.1, 0.1, 3_200).astype(np.float32)
                soundfile.write(file, wave, 16_000, format="WAV")
                tar.write(
                    {
                        "__key__": f"x{number}",
                        "wav": file.getvalue(),
                        "json": json.dumps(fact).encode(),
                    }
                )

    def labels(name, **more):
        task = task_with(
            train=[f"{{root}}/wds-{name}-*.tar"],
            valid=[],
            test=["{root}/wds-a-00.tar" if name != "a" else "{root}/wds-b-*.tar"],
            **more,
        )
        view = "segments" if "segment_seconds" in more else "pooled"
        return embed_task(tiny_encoder(), task, tmp_path, tmp_path / "cache", QUIET, kind=view)[
            "train"
        ]

    assert labels("a", label="genre").labels == ("jazz", "jazz")
    assert (
        labels("b", label="soundevent", separator=";", metric="mAP").labels
        == (("Dog", "Bark"),) * 2
    )
    found = labels(
        "c", label="events", separator=",", metric="segment_f1_macro", segment_seconds=0.1
    )
    assert found.labels == (((0.0, 0.1, "Dog"), (0.0, 0.1, "Speech")),) * 2
    assert found.lengths == (2, 2)
    assert found.features.shape == (4, 12)
