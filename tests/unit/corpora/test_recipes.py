"""Every recipe on a miniature of what its publisher ships, and the commands, against a local
server.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPOSITORY
from tests.support.audio import encode_audio, tone
from tests.support.downloads import Server, csv, lay_out, samples, tar_of, zip_of
from whisper_aut.cli import main
from whisper_aut.corpora import recipes
from whisper_aut.corpora.recipes import RECIPES
from whisper_aut.corpora.recipes.base import TABLE_COLUMNS
from whisper_aut.data.reader import Sample

TONE = tone(0.5)
WAV, FLAC, MP3 = (encode_audio(TONE, kind=kind) for kind in ("WAV", "FLAC", "MP3"))


def lines(*rows: dict[str, Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


FMA_TRACKS = csv(
    ",set,set,track,track",
    ",split,subset,genre_top,license",
    "track_id,,,,",
    "2,training,small,Hip-Hop,Attribution-NonCommercial",
    "135,test,large,Rock,Attribution",
    "140,test,small,Folk,Attribution",
)
# name → (files as published, labels or texts by split that must come out)
LAYOUTS: dict[str, tuple[dict[str, bytes], dict[str, set[str]]]] = {
    "librispeech": (
        {
            "LibriSpeech/dev-clean/84/121123/84-121123-0001.flac": FLAC,
            "LibriSpeech/dev-clean/84/121123/84-121123.trans.txt": b"84-121123-0001 BUT IN LESS",
        },
        {"dev-clean": {"but in less"}},
    ),
    "speech_commands_v1": (
        {
            "yes/a_nohash_0.wav": WAV,
            "no/b_nohash_0.wav": WAV,
            "no/c_nohash_0.wav": WAV,
            "_background_noise_/hum.wav": WAV,
            "validation_list.txt": b"no/b_nohash_0.wav\n",
            "testing_list.txt": b"no/c_nohash_0.wav\n",
        },
        {"train": {"yes"}, "valid": {"no"}, "test": {"no"}},
    ),
    "esc50": (
        {
            "ESC-50-master/audio/1-100032-A-0.wav": WAV,
            "ESC-50-master/audio/2-117271-A-12.wav": WAV,
            "ESC-50-master/meta/esc50.csv": csv(
                "filename,fold,target,category,esc10,src_file,take",
                "1-100032-A-0.wav,1,0,dog,True,100032,A",
                "2-117271-A-12.wav,2,12,crackling_fire,True,117271,A",
            ),
        },
        {"1": {"dog"}, "2": {"crackling_fire"}},
    ),
    "gtzan_filtered": (
        {
            f"genres/{genre}/{genre}.{number:05d}.wav": WAV
            for genre in ("blues", "jazz")
            for number in range(100)
        },
        {"train": {"blues", "jazz"}, "valid": {"blues", "jazz"}, "test": {"blues", "jazz"}},
    ),
    "audiocaps": (
        {
            "audio/r1nicOVtvkQ_130.wav": WAV,
            "audio/YzzNdwF40ID8.wav": WAV,
            "audio/-AheI8Epim4.wav": WAV,
            "train.csv": csv(
                "audiocap_id,youtube_id,start_time,caption", "1,r1nicOVtvkQ,130,A woman talks"
            ),
            "val.csv": csv("audiocap_id,youtube_id,start_time,caption", "2,-AheI8Epim4,30,Wind"),
            "test.csv": csv(
                "audiocap_id,youtube_id,start_time,caption",
                "3,zzNdwF40ID8,70,Rain",
                "4,zzNdwF40ID8,70,It rains",
            ),
        },
        {"train": {"A woman talks"}, "valid": {"Wind"}, "test": {"Rain"}},
    ),
    "musiccaps": (
        {
            "audio/-0Gj8-vB1q4.wav": WAV,
            "musiccaps-public.csv": csv(
                "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval",
                "-0Gj8-vB1q4,30,40,/m/0140xf,\"['low quality']\",A slow ballad,4,False,True",
            ),
        },
        {"test": {"A slow ballad"}},
    ),
    "clotho": (
        {
            f"{folder}/{folder} bell’s.wav": WAV
            for folder in ("development", "validation", "evaluation")
        }
        | {
            f"clotho_captions_{folder}.csv": csv(
                "file_name,caption_1,caption_2,caption_3,caption_4,caption_5",
                f"{folder} bell’s.wav,A bell,B,C,D,E",
            )
            for folder in ("development", "validation", "evaluation")
        }
        | {
            f"clotho_metadata_{folder}.csv": (
                "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\n"
                f'{folder} bell’s.wav,bell,{number},x,"[0, 1]",caf\xe9,'
                "http://creativecommons.org/licenses/by/3.0/"
            ).encode("cp1252")
            for folder, number in (
                ("development", "1234"),
                ("validation", "Not found"),
                ("evaluation", "5678"),
            )
        },
        {"train": {"A bell"}, "valid": {"A bell"}, "test": {"A bell"}},
    ),
    "musicbench": (
        {
            "datashare/data/a.wav": WAV,
            "datashare/data/b.wav": WAV,
            "MusicBench_train.json": lines({"location": "data/a.wav", "main_caption": "a waltz"}),
            "MusicBench_test_A.json": lines({"location": "data/b.wav", "main_caption": "a march"}),
        },
        {"train": {"a waltz"}, "test": {"a march"}},
    ),
    "wavcaps": (
        {
            "audio/17.flac": FLAC,
            "audio/18.flac": FLAC,
            "audio/YrbFXkhbpFJA.flac": FLAC,
            "audio/YtestOfCaps.flac": FLAC,
            "FreeSound_flac/9.flac": FLAC,
            "SoundBible_flac/9.flac": b"not what FreeSound's 9 sounds like",
            **{
                f"json_files/{name}": lines({"data": []})
                for name in ("BBC_Sound_Effects/bbc_final.json", "SoundBible/sb_final.json")
            },
            "json_files/FreeSound/fsd_final.json": lines(
                {
                    "data": [
                        {"id": "17", "caption": "Rain"},
                        {"id": "18", "caption": "No"},
                        {"id": "9", "caption": "Own"},
                    ]
                }
            ),
            "json_files/AudioSet_SL/as_final.json": lines(
                {
                    "data": [
                        {"id": "YrbFXkhbpFJA.wav", "caption": "Bells"},
                        {"id": "YtestOfCaps.wav", "caption": "No"},
                    ]
                }
            ),
            "json_files/blacklist/blacklist_exclude_all_ac.json": lines(
                {"FreeSound": ["18"], "AudioSet": ["YtestOfCaps.wav"]}
            ),
        },
        {"": {"Rain", "Own", "Bells"}},
    ),
    "fsd50k": (
        {
            "FSD50K.dev_audio/64760.wav": WAV,
            "FSD50K.dev_audio/16399.wav": WAV,
            "FSD50K.eval_audio/37199.wav": WAV,
            "FSD50K.ground_truth/dev.csv": csv(
                "fname,labels,mids,split",
                '64760,"Electric_guitar,Music",x,train',
                "16399,Bark,x,val",
            ),
            "FSD50K.ground_truth/eval.csv": csv("fname,labels,mids", "37199,Rain,x"),
            "FSD50K.metadata/dev_clips_info_FSD50K.json": lines(
                {"64760": {"license": "http://creativecommons.org/licenses/by/3.0/"}}
            ),
            "FSD50K.metadata/eval_clips_info_FSD50K.json": lines({}),
        },
        {"train": {"Electric_guitar", "Music"}, "valid": {"Bark"}, "test": {"Rain"}},
    ),
    "urbansound8k": (
        {
            "UrbanSound8K/audio/fold5/100032-3-0-0.wav": WAV,
            "UrbanSound8K/metadata/UrbanSound8K.csv": csv(
                "slice_file_name,fsID,start,end,salience,fold,classID,class",
                "100032-3-0-0.wav,100032,0.0,0.3,1,5,3,dog_bark",
            ),
        },
        {"5": {"dog_bark"}},
    ),
    "nsynth": (
        {f"nsynth-{split}/audio/bass_{split}.wav": WAV for split in ("train", "valid", "test")}
        | {
            f"nsynth-{split}/examples.json": lines(
                {
                    f"bass_{split}": {
                        "instrument_family_str": "bass",
                        "instrument_str": "bass_acoustic_003",
                        "instrument_source_str": "acoustic",
                        "qualities_str": ["fast_decay"],
                        "pitch": 40,
                        "velocity": 100,
                    }
                }
            )
            for split in ("train", "valid", "test")
        },
        {"train": {"bass"}, "valid": {"bass"}, "test": {"bass"}},
    ),
    "fma_small": (
        {
            "fma_metadata/tracks.csv": FMA_TRACKS,
            "fma_small/000/000002.mp3": MP3,
            "fma_small/000/000140.mp3": MP3,
        },
        {"train": {"Hip-Hop"}, "test": {"Folk"}},
    ),
    "crema_d": (
        {"CREMA-D/AudioWAV/1001_DFA_ANG_XX.wav": WAV, "CREMA-D/AudioWAV/odd.wav": WAV},
        {"": {"angry"}},
    ),
    "ravdess": (
        {"Actor_12/03-01-06-01-02-01-12.wav": WAV, "Actor_12/03-02-06-01-02-01-12.wav": WAV},
        {"": {"fearful"}},
    ),
    "vocalsound": (
        {
            "audio_16k/f0003_0_cough.wav": WAV,
            "audio_16k/m0004_0_sigh.wav": WAV,
            "audio_16k/m0005_0_sniff.wav": WAV,
        }
        | {
            f"datafiles/{name}.json": lines(
                {"data": [{"wav": f"/elsewhere/audio_16k/{file}.wav", "labels": "x"}]}
            )
            for name, file in (
                ("tr", "f0003_0_cough"),
                ("val", "m0004_0_sigh"),
                ("te", "m0005_0_sniff"),
            )
        },
        {"train": {"cough"}, "valid": {"sigh"}, "test": {"sniff"}},
    ),
    "voxlingua": (
        {"et/U__abc.wav": WAV, "iw/U__ghi.wav": WAV, "dev/fi/U__def.wav": WAV},
        {"train": {"et", "iw"}, "valid": {"fi"}},
    ),
    "folder": (
        {"train/dog/1.wav": WAV, "train/cat/1.wav": WAV, "test/dog/1.wav": WAV},
        {"train": {"dog", "cat"}, "test": {"dog"}},
    ),
}
BY_TEXT = {"librispeech", "audiocaps", "musiccaps", "clotho", "musicbench", "wavcaps"}


def values(found: list[Sample], by_text: bool) -> set[str]:
    if by_text:
        return {sample.annotation.text for sample in found}
    labels = [sample.annotation.label for sample in found]
    return {
        name for label in labels for name in (label if isinstance(label, list) else [label]) if name
    }


@pytest.mark.parametrize(
    ("name", "field", "groups"),
    [
        ("esc50", "freesound_id", {"100032", "117271"}),
        ("speech_commands_v1", "speaker", {"a", "b", "c"}),
        ("nsynth", "instrument", {"bass_acoustic_003"}),
        ("vocalsound", "speaker", {"f0003", "m0004", "m0005"}),
        ("crema_d", "speaker", {"1001"}),
        ("ravdess", "speaker", {"12"}),
        ("urbansound8k", "freesound_id", {"100032"}),
    ],
)
def test_rows_say_which_clips_belong_together(
    name: str, field: str, groups: set[str], tmp_path: Path
):
    """What probe tasks name as `group`: intervals and tests count speakers and recordings, not
    their clips.
    """
    raw = lay_out(tmp_path, LAYOUTS[name][0])
    assert {str(row[field]) for row in RECIPES[name].rows(raw)} == groups


def test_one_module_and_its_yaml_add_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hums.py").write_text(
        "def hums(raw):\n    yield {'audio': 'a.wav', 'text': 'a hum'}\n"
    )
    (tmp_path / "hums.yaml").write_text("hums: {title: Hums, domain: sound, licence: CC0-1.0}\n")
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    loaded = recipes.load_recipes()
    assert set(loaded) == {*RECIPES, "hums"}
    assert (loaded["hums"].title, loaded["hums"].rows.__name__) == ("Hums", "hums")


def test_every_recipe_has_a_miniature():
    assert set(LAYOUTS) | {"speech_commands_v2_35", "x-ares"} == set(RECIPES)
    for recipe in RECIPES.values():
        assert recipe.archives or recipe.manual_steps
        assert all(
            re.fullmatch(r"(sha256:\w{64}|sha1:\w{40}|md5:\w{32}|)", archive.checksum)
            for archive in recipe.archives
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_corpus_builds_as_it_is_published(name: str, tmp_path: Path):
    files, expected = LAYOUTS[name]
    raw, out = lay_out(tmp_path / "raw", files), tmp_path / "out"
    assert (
        main(
            [
                "data",
                "build",
                name,
                str(raw),
                "--out",
                str(out),
                "--workers",
                "1",
                "--max-skipped-fraction",
                "0.9",
            ]
        )
        == 0
    )
    found = {split: samples(out / split) for split in expected}
    assert {split: values(clips, name in BY_TEXT) for split, clips in found.items()} == expected
    first = next(iter(found.values()))[0].annotation
    assert first.licence or name == "folder"
    assert first.text or name == "folder"
    if name == "fsd50k":
        assert first.licence == "http://creativecommons.org/licenses/by/3.0/"
        assert first.extra["freesound_id"] == "64760"
    if name == "clotho":
        assert first.extra["texts"] == ["A bell", "B", "C", "D", "E"]
        sites = [clips[0].annotation.extra.get("freesound_id", "") for clips in found.values()]
        assert sites == ["1234", "", "5678"]
        assert first.licence == "http://creativecommons.org/licenses/by/3.0/"
    if name == "voxlingua":
        spoken = {(sample.annotation.language, sample.annotation.text) for sample in found["train"]}
        assert spoken == {("et", "speech in Estonian"), ("he", "speech in Hebrew")}
    if name == "gtzan_filtered":
        ids = {split: {sample.annotation.id for sample in clips} for split, clips in found.items()}
        assert sum(map(len, ids.values())) == len(set.union(*ids.values()))


@pytest.mark.parametrize(
    ("name", "missing", "splits"),
    [
        ("nsynth", ("nsynth-valid", "nsynth-test"), {"train"}),
        ("audiocaps", ("train.csv", "test.csv"), {"valid"}),
        (
            "clotho",
            ("development", "clotho_metadata_dev", "clotho_captions_dev"),
            {"valid", "test"},
        ),
        ("musicbench", ("MusicBench_train.json",), {"test"}),
        ("fsd50k", ("FSD50K.eval_audio",), {"train", "valid"}),
        ("fsd50k", ("FSD50K.dev_audio",), {"test"}),
        ("wavcaps", ("json_files/BBC", "json_files/SoundBible"), {""}),
    ],
)
def test_a_corpus_that_was_downloaded_in_part_builds_from_the_available_parts(
    name: str, missing: tuple[str, ...], splits: set[str], tmp_path: Path
):
    files = {path: body for path, body in LAYOUTS[name][0].items() if not path.startswith(missing)}
    raw, out = lay_out(tmp_path / "raw", files), tmp_path / "out"
    command = ["data", "build", name, str(raw), "--out", str(out), "--workers", "1"]
    assert main([*command, "--max-skipped-fraction", "0.9"]) == 0
    assert {path.parent.name if any(splits) else "" for path in out.rglob("*.tar")} == splits


@pytest.mark.parametrize(
    "name", sorted(set(LAYOUTS) - {"folder", "wavcaps", "ravdess", "voxlingua"})
)
def test_what_is_missing_is_named_with_the_command_that_downloads_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "my raw").mkdir()
    out = str(tmp_path / "out")
    assert main(["data", "build", name, str(tmp_path / "my raw"), "--out", out]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert f"whisper-aut data get {name} --out '{tmp_path / 'my raw'}'" in message
    assert "NAME" not in message


def test_get_only_one_archive_and_build_it_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    name = "nsynth-train.jsonwav.tar.gz"
    files = {path: body for path, body in LAYOUTS["nsynth"][0].items() if "-train/" in path}
    server = Server({name: tar_of(tmp_path / name, files).read_bytes()})
    command = ["data", "get", "nsynth", "--only", "train", "--mirror", server.url]
    ran = []
    while command:
        assert main(command) == 0, command
        ran.append(command[1])
        printed = re.search(r"^Next: whisper-aut (.+)$", capsys.readouterr().out, re.M)
        command = shlex.split(printed.group(1)) if printed else []
    server.shutdown()
    assert ran == ["get", "build", "inspect"]


@pytest.mark.parametrize(
    "stem",
    [
        "r1nicOVtvkQ",
        "Yr1nicOVtvkQ",
        "r1nicOVtvkQ_130",
        "Yr1nicOVtvkQ_130",
        "r1nicOVtvkQ_130_140",
        "r1nicOVtvkQ_130000_140000",
        "r1nicOVtvkQ_130000_138480",
        "r1nicOVtvkQ_130.000_140.000",
        "91139",
    ],
)
def test_audiocaps_is_found_under_every_downloaders_names(stem: str, tmp_path: Path):
    table = csv("audiocap_id,youtube_id,start_time,caption", "91139,r1nicOVtvkQ,130,A woman talks")
    files = {"train.csv": table, f"audio/{stem}.flac": FLAC, "audio/r1nicOVtvkQ_7_17.flac": FLAC}
    (row,) = RECIPES["audiocaps"].rows(lay_out(tmp_path, files))
    assert (row["audio"], row["id"]) == (f"audio/{stem}.flac", "r1nicOVtvkQ_130")


def test_voxlingua_writes_the_languages_name(tmp_path: Path):
    codes = ("et", "iw", "jw", "haw", "war", "sco", "ht")
    rows = RECIPES["voxlingua"].rows(lay_out(tmp_path, {f"{code}/a.wav": WAV for code in codes}))
    assert {row["label"]: row["text"].removeprefix("speech in ") for row in rows} == {
        "et": "Estonian",
        "iw": "Hebrew",
        "jw": "Javanese",
        "haw": "Hawaiian",
        "war": "Waray",
        "sco": "Scots",
        "ht": "Haitian Creole",
    }


def test_the_texts_of_fsd50k_leave_out_what_a_class_implies(tmp_path: Path):
    files, _ = LAYOUTS["fsd50k"]
    music = "Musical_instrument,Music"
    labels = [
        f"Electric_guitar,Guitar,{music}",
        f"Electric_guitar,Guitar,Rain,{music}",
        f"Acoustic_guitar,Guitar,{music}",
        f"Piano,{music}",
        music,
        "Rain",
    ]
    rows = [f'{number},"{names}",x,train' for number, names in enumerate(labels)]
    audio = {f"FSD50K.dev_audio/{number}.wav": WAV for number in range(len(labels))}
    table = {"FSD50K.ground_truth/dev.csv": csv("fname,labels,mids,split", *rows)}
    found = list(RECIPES["fsd50k"].rows(lay_out(tmp_path, files | audio | table)))
    assert [row["text"].removeprefix("the sounds of ") for row in found[: len(labels)]] == [
        "electric guitar",
        "electric guitar, rain",
        "acoustic guitar",
        "piano",
        "musical instrument, music",
        "rain",
    ]
    assert found[0]["label"] == labels[0].split(","), "the probe task wants all classes"


def test_an_fsd50k_table_without_splits_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its clips would otherwise become test clips."""
    files = dict(LAYOUTS["fsd50k"][0])
    files["FSD50K.ground_truth/dev.csv"] = csv("fname,labels,mids", "16399,Bark,x")
    raw = lay_out(tmp_path / "raw", files)
    assert main(["data", "build", "fsd50k", str(raw), "--out", str(tmp_path / "out")]) == 1
    assert "does not have the layout" in " ".join(capsys.readouterr().err.split())


def test_a_clip_without_a_licence_in_the_tables_has_none(tmp_path: Path):
    files, _ = LAYOUTS["fsd50k"]
    files = files | {"FSD50K.metadata/dev_clips_info_FSD50K.json": lines({})}
    raw = lay_out(tmp_path / "raw", files)
    command = ["data", "build", "fsd50k", str(raw), "--out", str(tmp_path / "out")]
    assert main([*command, "--workers", "1", "--max-skipped-fraction", "0.9"]) == 0
    clips = samples(tmp_path / "out" / "train")
    assert {clip.annotation.licence for clip in clips} == {""}


def test_get_and_build_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    archive = zip_of(tmp_path / "master.zip", LAYOUTS["esc50"][0]).read_bytes()
    server = Server({"master.zip": archive})
    server.cut = len(archive) // 2 + 1
    assert main(["data", "get", "esc50", "--mirror", server.url]) == 0
    assert len(server.asked) == 2
    assert main(["data", "build", "esc50", "--out", "shards", "--workers", "1"]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert main(["data", "build", "esc50", "--out", "shards", "--workers", "1"]) == 0
    assert "reused" in capsys.readouterr().out
    wrong = tar_of(
        tmp_path / "speech_commands_v0.01.tar.gz", LAYOUTS["speech_commands_v1"][0]
    ).read_bytes()
    server.files["speech_commands_v0.01.tar.gz"], server.cut = wrong, 0
    assert main(["data", "get", "speech_commands_v1", "--mirror", server.url]) == 1
    assert "not the file that the recipe was written for" in capsys.readouterr().err
    server.shutdown()


def _esc50() -> dict[str, bytes]:
    clips = [(fold, number) for fold in range(1, 6) for number in range(50)]
    rows = [f"{fold}-{n}-A-{n}.wav,{fold},{n},class {n},False,{fold}{n},A" for fold, n in clips]
    table = csv("filename,fold,target,category,esc10,src_file,take", *rows)
    audio = {f"ESC-50-master/audio/{fold}-{n}-A-{n}.wav": WAV for fold, n in clips}
    return audio | {"ESC-50-master/meta/esc50.csv": table}


def _gtzan() -> dict[str, bytes]:
    from torchaudio.datasets import gtzan

    names = [*gtzan.filtered_train, *gtzan.filtered_valid, *gtzan.filtered_test]
    return {f"genres/{name.partition('.')[0]}/{name}.wav": WAV for name in names}


def _speech_commands() -> dict[str, bytes]:
    words = [f"word{number}" for number in range(35)]
    lists = {
        f"{split}_list.txt": "".join(f"{word}/{split}.wav\n" for word in words).encode()
        for split in ("validation", "testing")
    }
    return lists | {
        f"{word}/{clip}.wav": WAV
        for word in words
        for clip in ("training", "validation", "testing")
    }


@pytest.mark.parametrize(
    ("name", "archive", "files"),
    [
        ("esc50", "master.zip", _esc50),
        ("gtzan_filtered", "genres.tar.gz", _gtzan),
        ("speech_commands_v2_35", "speech_commands_v0.02.tar.gz", _speech_commands),
    ],
)
def test_each_printed_command_works_as_printed_and_the_last_one_scores(
    name: str,
    archive: str,
    files: Callable[[], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    pack = zip_of if archive.endswith(".zip") else tar_of
    server = Server({archive: pack(tmp_path / archive, files()).read_bytes()})
    recipe = RECIPES[name]
    unchecked = tuple(replace(one, checksum="") for one in recipe.archives)
    monkeypatch.setitem(RECIPES, name, replace(recipe, archives=unchecked))
    command = ["data", "get", name, "--mirror", server.url]
    commands = []
    while command:
        assert main(command) == 0, command
        printed = re.search(r"^Next: whisper-aut (.+)$", capsys.readouterr().out, re.M)
        command = shlex.split(printed.group(1)) if printed else []
        commands.append(command[:2])
    server.shutdown()
    assert commands == [["data", "build"], ["probe", "logmel"], []]
    scores = json.loads(Path("runs/probe/scores.json").read_text())
    assert [entry["task"] for entry in scores["entries"]] == [name]


def test_other_corpora_print_a_command_that_looks_at_their_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    lay_out(Path("my clips"), {"train/dog/a.wav": WAV, "train/cat/b.wav": WAV})
    build = ["data", "build", "folder", "my clips", "--domain", "sound", "--workers", "1"]
    assert main([*build, "--out", "data/my shards"]) == 0
    printed = re.search(r"^Next: whisper-aut (.+)$", capsys.readouterr().out, re.M)
    assert printed
    assert main(shlex.split(printed.group(1))) == 0
    assert "2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get", "clotho"], "has to be downloaded by hand"),
        (["get", "gtzan_filtered"], "has to be downloaded by hand"),
        (["get", "esc-50"], "Did you mean 'esc50'"),
        (["get", "librispeech", "--only", "train-clean-999"], "no archive"),
        (["build", "esc50", "--out", "x"], "whisper-aut data get esc50"),
        (["build", "esc50", "empty", "--out", "x"], "does not contain meta/esc50.csv"),
        (["build", "folder", "empty", "--out", "x"], "has no audio files"),
        (["build", "folder", "flat", "--out", "x"], "is not in the folder of a class"),
        (["build", "x-ares", "empty", "--out", "x"], "nothing has to be built"),
        (["build", "clips.csv", "empty", "--out", "x"], "is not the name of a corpus"),
        (["build", "wavcaps", "empty", "--out", "x"], "blacklist"),
        (["build", "wavcaps", "odd", "--out", "x"], "excludes clips of 'Clotho'"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    lay_out(tmp_path / "odd", {"blacklist.json": lines({"Clotho": ["1"]})})
    lay_out(tmp_path / "flat", {"a.wav": WAV})
    assert main(["data", *arguments]) == 1
    captured = capsys.readouterr().err
    assert message in captured.replace("\n", " ")
    assert "Traceback" not in captured


def test_the_documentation_has_the_table_that_list_prints(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "list"]) == 0
    assert "librispeech" in capsys.readouterr().out
    rows = [TABLE_COLUMNS, (":---",) * len(TABLE_COLUMNS)]
    rows += [recipe.table_row() for recipe in RECIPES.values()]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    assert table in (REPOSITORY / "docs" / "data.md").read_text()
