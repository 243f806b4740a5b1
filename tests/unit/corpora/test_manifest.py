import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from whisper_aut.corpora.manifest import (
    Entry,
    Manifest,
    ManifestSpec,
    Segment,
    SkippedRow,
    read_annotations,
)
from whisper_aut.data.annotation import Annotation, Template
from whisper_aut.errors import SkipReason, UserError


def table(folder: Path, content: str | bytes, name: str = "clips.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(folder: Path, *rows: Any) -> Path:
    return table(folder, "\n".join(json.dumps(row) for row in rows), "clips.jsonl")


def items(path: Path, **spec: Any) -> list[Entry | SkippedRow]:
    return list(Manifest(ManifestSpec(path, **spec)).entries())


def entries(path: Path, **spec: Any) -> list[Entry]:
    found = items(path, **spec)
    assert not [item for item in found if isinstance(item, SkippedRow)]
    return [item for item in found if isinstance(item, Entry)]


def skipped_row(path: Path, **spec: Any) -> SkippedRow:
    (row,) = [item for item in items(path, **spec) if isinstance(item, SkippedRow)]
    return row


def test_a_csv_needs_no_spec(tmp_path: Path):
    path = table(
        tmp_path,
        "\ufefffilename,caption,fold,domain\n"
        'a/b.wav,"a dog,\nbarking",1,sound\nc.wav,rain,2,sound\n',
    )
    first, second = entries(path)
    assert (first.path, first.key, first.line, second.line) == (tmp_path / "a/b.wav", "b", 3, 4)
    assert (first.annotation.text, first.annotation.domain, first.annotation.id) == (
        "a dog,\nbarking",
        "sound",
        "b",
    )
    assert first.annotation.extra == {
        "filename": "a/b.wav",
        "caption": "a dog,\nbarking",
        "fold": "1",
    }


@pytest.mark.parametrize("first", [0, 1, 30])
def test_the_nameless_index_that_pandas_writes_is_no_column(tmp_path: Path, first: int):
    rows = "".join(f"{first + n},r{n}.wav,clip {n}\n" for n in range(6))
    path = table(tmp_path, ",path,text\n" + rows)
    found = entries(path)
    assert Manifest(ManifestSpec(path)).columns == ("path", "text")
    assert [entry.segment for entry in found] == [None] * 6, "whole clips"
    assert found[0].annotation.extra == {"path": "r0.wav"}
    found = entries(jsonl(tmp_path, {"": first, "path": "r0.wav", "text": "clip 0"}))
    assert (found[0].segment, found[0].annotation.extra) == (None, {"path": "r0.wav"})


@pytest.mark.parametrize("nothing", ["null", "NaN", '""', '" "', "[]", "[null]"])
def test_empty_values_are_the_same_in_a_tar_and_in_a_manifest(tmp_path: Path, nothing: str):
    whole = '{"path": "a.wav", "text": "t", "label": T, "offset": T, "language": T, "genre": T}'
    path = table(tmp_path, whole.replace("T", nothing), "clips.jsonl")
    (entry,) = entries(path)
    in_tar = Annotation.from_json(whole.replace("T", nothing).encode())
    assert entry.annotation == replace(in_tar, id="a")
    assert (entry.annotation.label, entry.segment) == (None, None)
    alone = table(tmp_path, '{"path": "a.wav", "text": T}'.replace("T", nothing), "alone.jsonl")
    assert skipped_row(alone).reason is SkipReason.NO_TEXT


def test_a_text_is_looked_for_in_each_row_unless_a_column_is_named(tmp_path: Path):
    rows = ({"wav": "a.wav", "caption": ["one", "two"]}, {"wav": "b.wav", "text": "three"})
    path = jsonl(tmp_path, *rows)
    assert [entry.annotation.text for entry in entries(path)] == ["one", "three"]
    assert skipped_row(path, text="caption").reason is SkipReason.NO_TEXT


def test_columns_that_are_not_the_named_one_are_no_texts(tmp_path: Path):
    rows = (
        {"wav": "a.wav", "caption": "one", "texts": ["eins", "un"], "sentence": "kept"},
        {"wav": "b.wav", "caption": "", "sentence": "zwei", "label": "two"},
    )
    found = [one.annotation for one in entries(jsonl(tmp_path, *rows), text="caption")]
    read = [Annotation.from_json(one.to_json()) for one in found]
    assert [one.texts for one in read] == [("one",), ()]
    assert read[0].extra["sentence"] == "kept"


def test_a_row_that_no_reader_could_parse_is_skipped(tmp_path: Path):
    path = table(tmp_path, '{"path": "a.wav", "text": "t", "snr": 1e999}', "clips.jsonl")
    assert "Infinity" in skipped_row(path).detail


def test_times_of_any_size_are_read(tmp_path: Path):
    path = jsonl(tmp_path, {"path": "a.wav", "text": "t", "offset": 10**400})
    assert "must be seconds" in skipped_row(path).detail


def test_a_tsv_has_no_quoting(tmp_path: Path):
    path = table(tmp_path, 'path\tsentence\na.mp3\t"Go," he said.\n', "clips.tsv")
    assert entries(path)[0].annotation.text == '"Go," he said.'


def test_jsonl_keeps_types_and_columns_that_only_some_rows_have(tmp_path: Path):
    path = jsonl(
        tmp_path,
        {"audio": "a.wav", "text": 7, "id": 12},
        {"audio": "b.wav", "text": "x", "tags": [1, {"k": None}], "n": 0.5},
    )
    first, second = entries(path)
    assert (first.annotation.text, first.annotation.id, first.key) == ("7", "12", "12")
    assert second.annotation.extra == {"audio": "b.wav", "tags": [1, {"k": None}], "n": 0.5}


def test_the_spec_wins_over_columns_of_the_same_name(tmp_path: Path):
    path = table(
        tmp_path,
        "path,text,label,domain,task,language,source,licence,answer\na.wav,t,l,speech,asr,en,here,MIT,yes\n",
    )
    own = entries(path)[0].annotation
    assert (own.label, own.domain, own.task, own.language, own.source, own.licence, own.answer) == (
        *("l", "speech", "asr", "en", "here", "MIT", "yes"),
    )
    given = {
        "domain": "music",
        "task": "tag",
        "language": "de",
        "source": "there",
        "licence": "CC0",
    }
    assert {name: getattr(entries(path, **given)[0].annotation, name) for name in given} == given
    assert entries(path, text="task", label="{source}-{licence}")[0].annotation.label == "here-MIT"


def test_templates_fill_in_columns_and_write_underscores_as_spaces(tmp_path: Path):
    path = jsonl(tmp_path, {"wav": "a.wav", "meta.class": "dog_bark", "tags": ["a_b", "c"], "n": 3})
    annotation = entries(
        path, text="the sound of a {meta.class:words}, {tags:words} {{{n}}}", label="{meta.class}"
    )[0].annotation
    assert (annotation.text, annotation.label) == (
        "the sound of a dog bark, a b, c {3}",
        "dog_bark",
    )


def test_labels_may_be_numbers_or_lists(tmp_path: Path):
    path = jsonl(tmp_path, {"wav": "a.wav", "label": 0}, {"wav": "b.wav", "label": ["x", "y"]})
    assert [entry.annotation.label for entry in entries(path)] == ["0", ["x", "y"]]


@pytest.mark.parametrize("template", ["{0}", "{}", "{text.__class__}", "{text[0]}"])
def test_templates_reach_columns_and_nothing_else(tmp_path: Path, template: str):
    with pytest.raises(UserError):
        Manifest(ManifestSpec(table(tmp_path, "wav,text\na.wav,t\n"), text=template))


@pytest.mark.parametrize("template", ["{text!r}", "{text:>9}", "{text", "text}{"])
def test_templates_that_are_not_understood_say_so(tmp_path: Path, template: str):
    with pytest.raises(UserError, match=r"Write \{column\} or \{column:words\}"):
        Manifest(ManifestSpec(table(tmp_path, "wav,text\na.wav,t\n"), text=template))


def test_a_row_without_text_label_and_answer_is_skipped(tmp_path: Path):
    path = table(tmp_path, "wav,text,label,answer\na.wav, ,,\nb.wav,,dog,\nc.wav,,,yes\n")
    assert [getattr(item, "reason", None) for item in items(path)] == [
        SkipReason.NO_TEXT,
        None,
        None,
    ]
    assert (
        skipped_row(table(tmp_path, "wav,kind\na.wav,\n"), text="a {kind}").reason
        is SkipReason.NO_TEXT
    )


def test_keys_are_unique_and_safe_whatever_the_names(tmp_path: Path):
    names = [
        "a.wav",
        "x/a.wav",
        "a-2.wav",
        "../../etc/pass.wd.wav",
        "ü 犬.wav",
        "....wav",
        "b" * 150 + ".wav",
        "y/a.wav",
    ]
    keys = [
        entry.key
        for entry in entries(jsonl(tmp_path, *({"wav": name, "text": "t"} for name in names)))
    ]
    assert keys == ["a", "a-2", "a-2-2", "pass_wd", "ü_犬", "clip", "b" * 100, "a-3"]


def test_relative_paths_start_from_the_root_and_absolute_ones_stay(tmp_path: Path):
    path = table(tmp_path, "wav,text\na.wav,t\n/data/b.wav,t\n")
    assert [entry.path for entry in entries(path, audio_root=tmp_path / "audio")] == [
        tmp_path / "audio/a.wav",
        Path("/data/b.wav"),
    ]
    assert (
        "wav" not in entries(path)[1].annotation.extra
    )  # the name of a folder on somebody's machine is not published


def test_where_keeps_rows_by_value(tmp_path: Path):
    manifest = Manifest(
        ManifestSpec(
            table(tmp_path, "wav,text,fold\na.wav,t,1\nb.wav,t,2\nc.wav,t,3\n"),
            where={"fold": ["1", "3"]},
        )
    )
    assert [item.path.name for item in manifest.entries() if isinstance(item, Entry)] == [
        "a.wav",
        "c.wav",
    ]
    assert manifest.filtered_rows == 1


def test_splits_get_a_folder_name_and_never_share_one(tmp_path: Path):
    path = table(tmp_path, "wav,text,split\na.wav,t,train.clean\nb.wav,t,../up\nc.wav,t,\n")
    assert [item.split for item in items(path, split_by="split")] == ["train_clean", "up", ""]
    assert skipped_row(path, split_by="split").reason is SkipReason.BAD_ROW
    path = table(tmp_path, "wav,text,split\na.wav,t,a b\nb.wav,t,a/b\n")
    with pytest.raises(UserError, match="would share the folder a_b"):
        items(path, split_by="split")


def test_a_column_of_names_is_no_split(tmp_path: Path):
    path = table(tmp_path, "wav,text\n" + "".join(f"{number}.wav,t\n" for number in range(300)))
    with pytest.raises(UserError, match="more than 256 values"):
        items(path, split_by="wav")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "expected an object, found list"),
        ('{"wav": "b.wav", "text": "t", "n": Infinity}', "Infinity is not a JSON value"),
        ("[" * 100_000, "not JSON"),
        ('{"text": "t"}', "no path in column 'wav'"),
        ('{"wav": "b\\u0000.wav", "text": "t"}', "no path in column 'wav'"),
        ('{"wav": {"path": "b.wav"}, "text": "t"}', "column 'wav' must be text, not dict"),
        ('{"wav": "b.wav", "text": {"en": "t"}}', "'text' must be text, not dict"),
        ('{"wav": "b.wav", "text": "t", "domain": "n/a"}', "not a name such as speech"),
        ('{"wav": "b.wav", "text": "\\ud800"}', "surrogate pair"),
        ('{"wav": "b.wav", "text": "' + "t" * (1 << 20) + '"}', "bytes of JSON, limit"),
    ],
)
def test_a_bad_row_is_skipped_and_the_others_are_kept(tmp_path: Path, line: str, message: str):
    path = table(
        tmp_path,
        '{"wav": "a.wav", "text": "t"}\n\n' + line + "\n" + '{"wav": "c.wav", "text": "t"}',
        "clips.jsonl",
    )
    row = skipped_row(path)
    assert (row.reason, row.line, len(items(path))) == (SkipReason.BAD_ROW, 3, 3)
    assert message in row.detail


def test_a_csv_row_of_another_length_is_skipped(tmp_path: Path):
    path = table(tmp_path, 'wav,text\na.wav,t\nb.wav,t,more\nc.wav\n"d.wav"x,t\ne.wav,t\n')
    rows = [(row.line, row.detail) for row in items(path) if isinstance(row, SkippedRow)]
    assert rows == [
        (3, "3 cells where the header has 2"),
        (4, "1 cells where the header has 2"),
        (5, "',' expected after '\"'"),
    ]


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        ("", {}, "holds no rows"),
        ("wav,text\n", {}, "holds no rows"),
        ("wav,text\na\nb\n", {}, "no row that can be read. Line 2: 1 cells"),
        ("wav,text,text\na.wav,t,t\n", {}, "has the column 'text' twice"),
        (
            "clip,text\na.wav,t\n",
            {},
            r"no audio column \(looked for audio, path.*Its columns: clip, text.*--audio COLUMN",
        ),
        ("wav,words\na.wav,t\n", {}, r"no text column.*Its columns: wav, words.*--text COLUMN"),
        (
            "wav,text\na.wav,t\n",
            {"audio": "wave"},
            "no column 'wave', which --audio names. Did you mean 'wav'",
        ),
        (
            "wav,text\na.wav,t\n",
            {"text": "a {txt}"},
            "no column 'txt', which --text names. Did you mean 'text'",
        ),
        (
            "wav,text\na.wav,t\n",
            {"label": "class"},
            "no column 'class', which --label names. Its columns: wav, text",
        ),
        (
            "wav,text\na.wav,t\n",
            {"where": {"fold": ["1"]}},
            "no column 'fold', which --where names",
        ),
        ("wav,text\na.wav,t\n", {"split_by": "fold"}, "no column 'fold', which --split-by names"),
        (
            "wav,text\na.wav,t\n",
            {"domain": "Sound"},
            "Domain 'Sound' is not a name in lower case, such as speech, sound, music",
        ),
        (
            b"wav,text\na.wav,caf\xe9\n",
            {},
            r"Line 2 of .* is not UTF-8 \(byte 0xe9\).*iconv -f LATIN1",
        ),
        ("wav,text\na.wav,t\n".encode("utf-16"), {}, r"is not UTF-8.*iconv -f UTF-16"),
        (
            'wav,text\na.wav,t\nb.wav,"t\nc.wav,t\n',
            {},
            "row that begins at line 3 of .* is never closed",
        ),
        ('wav,"text\na.wav,t\n', {}, "header line of .* cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_an_error(
    tmp_path: Path, content: str | bytes, spec: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message):
        items(table(tmp_path, content), **spec)


def test_the_error_for_a_json_array_shows_how_to_convert_it(tmp_path: Path):
    with pytest.raises(UserError, match=r"jq -c '\.\[\]'"):
        items(table(tmp_path, '[\n{"wav": "a.wav"}]', "clips.json"))


def test_the_error_for_a_missing_manifest_lists_the_tables_of_the_folder(tmp_path: Path):
    table(tmp_path, "", "clips.csv")
    with pytest.raises(
        UserError,
        match=rf"no manifest {tmp_path}/clip\.csv\. Did you mean 'clips\.csv'\? There: clips\.csv",
    ):
        Manifest(ManifestSpec(tmp_path / "clip.csv"))
    with pytest.raises(UserError, match="is not a manifest: expected a file that ends in"):
        Manifest(ManifestSpec(table(tmp_path, "", "clips.xlsx")))


def cut(id: str, start: float, seconds: float, texts: list[str], kind: str = "MonoCut") -> str:
    """A line of a lhotse CutSet over a file of ten seconds."""
    spoken = [
        {"id": f"{id}-{n}", "start": n, "duration": 1.0, "text": text, "language": "German"}
        for n, text in enumerate(texts)
    ]
    source = {"type": "file", "channels": [0], "source": "long.wav"}
    recording = {"id": "r", "sources": [source], "sampling_rate": 16_000, "duration": 10.0}
    about = {"id": id, "type": kind, "channel": 0, "start": start, "duration": seconds}
    custom = {"snr": 7} if start else None
    return json.dumps(about | {"supervisions": spoken, "recording": recording, "custom": custom})


def test_the_cuts_of_lhotse_are_rows(tmp_path: Path):
    lines = [
        cut("whole", 0.0, 10.0, ["guten", "tag"]),
        cut("part", 2.5, 1.5, ["ja"]),
        cut("mixed", 0.0, 1.0, ["x"], kind="MixedCut"),
    ]
    path = tmp_path / "cuts.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    whole, part, mixed = Manifest(ManifestSpec(path, task="asr")).entries()
    assert isinstance(whole, Entry)
    assert isinstance(part, Entry)
    assert (whole.path, whole.segment) == (tmp_path / "long.wav", None)
    assert (whole.annotation.text, whole.annotation.language) == ("guten tag", "German")
    assert whole.annotation.extra["segments"] == [
        {"start": 0, "end": 1.0, "text": "guten"},
        {"start": 1, "end": 2.0, "text": "tag"},
    ]
    assert (part.segment, part.annotation.text) == (Segment(2.5, 1.5), "ja")
    assert part.annotation.extra["snr"] == 7
    assert isinstance(mixed, SkippedRow)
    assert "a MixedCut that is not an unchanged part of a mono file" in mixed.detail


def test_cuts_of_one_channel_of_several_or_at_another_speed_are_skipped(tmp_path: Path):
    line = cut("a", 0.0, 10.0, ["x"])
    stereo = line.replace('"channels": [0]', '"channels": [0, 1]')
    faster, resampled = (
        line.replace('"id": "r"', f'"id": "r", "transforms": [{{"name": "{name}"}}]')
        for name in ("Speed", "Resample")
    )
    path = table(tmp_path, "\n".join([line, stereo, faster, resampled]), "cuts.jsonl")
    found = [isinstance(one, Entry) for one in Manifest(ManifestSpec(path)).entries()]
    assert found == [True, False, False, True]


def test_a_table_of_parquet_that_is_none_is_an_error(tmp_path: Path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    for path in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
            Manifest(ManifestSpec(path))


@pytest.mark.parametrize("kind", ["Sequence", "List", "in brackets"])  # of three versions
def test_lists_of_class_labels_become_lists_of_names(kind: str, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def list_of(item: Any) -> Any:
        return [item] if kind == "in brackets" else {"feature": item, "_type": kind}

    label = {"names": ["dog", "cat"], "_type": "ClassLabel"}
    number = {"dtype": "float32", "_type": "Value"}
    features = {"classes": list_of(label), "events": list_of({"event": label, "onset": number})}
    rows = {"path": ["0.wav", "1.wav"], "text": ["a", "b"], "classes": [[1, 0], []]}
    table = pyarrow.table(rows | {"events": [[{"event": 1, "onset": 0.5}], []]})
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "t.parquet")
    found = list(Manifest(ManifestSpec(manifest=str(tmp_path / "t.parquet"))).entries())
    extra = [one.annotation.extra for one in found if isinstance(one, Entry)]
    assert [one.get("classes") for one in extra] == [["cat", "dog"], None]
    assert extra[0]["events"] == [{"event": "cat", "onset": 0.5}]


def test_splits_are_named_by_files_with_and_without_a_hash(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001-da5e1b2a", "test-00000-of-00001"):
        rows = pyarrow.table({"path": ["a.wav"], "text": [name]})
        parquet.write_table(rows, tmp_path / "data" / f"{name}.parquet")
    found = entries(tmp_path, split_by="split")
    assert {one.split: one.annotation.text.partition("-")[0] for one in found} == {
        "train": "train",
        "test": "test",
    }


def test_annotations_of_parquet_have_the_names_of_classes(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    label = {"names": ["dog", "cat"], "_type": "ClassLabel"}
    metadata = {b"huggingface": json.dumps({"info": {"features": {"label": label}}}).encode()}
    rows = pyarrow.table({"id": ["a"], "label": [1]}).replace_schema_metadata(metadata)
    parquet.write_table(rows, tmp_path / "rows.parquet")
    assert read_annotations(tmp_path / "rows.parquet") == {"a": {"label": "cat"}}


def test_a_manifest_whose_compressed_end_is_missing_is_an_error(tmp_path: Path):
    rows = "".join(f'{{"path": "{n}.wav", "text": "t"}}\n' for n in range(99))
    with pytest.raises(UserError, match=r"clips\.jsonl\.gz is damaged"):
        entries(table(tmp_path, gzip.compress(rows.encode())[:-20], "clips.jsonl.gz"))


@pytest.mark.parametrize("nothing", [float("nan"), None, [None, float("nan")]])
def test_a_template_needs_a_value_and_leaves_out_empty_items(nothing: Any):
    template = Template("a {mood} tune")
    assert template.fill({"mood": nothing}) == ""
    assert template.fill({"mood": [None, "sad", float("nan"), "slow"]}) == "a sad, slow tune"
