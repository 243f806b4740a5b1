import json
from pathlib import Path

import pandas
import pytest

from whisper_aut.corpora.manifest import read_annotations
from whisper_aut.data.annotation import (
    KEY_FIELD,
    MAX_JSON_BYTES,
    Annotation,
    FieldMapping,
    has_value,
)
from whisper_aut.errors import SkipReason, SkipSample, UserError


def test_what_is_written_reads_back_the_same():
    annotation = Annotation(
        "a dog · 犬",
        "sound",
        "caption",
        label=["dog", "bark"],
        duration_seconds=1.5,
        id="7",
        extra={"fold": 1},
    )
    assert Annotation.from_json(annotation.to_json()) == annotation


def test_only_fields_that_are_set_are_written():
    assert json.loads(Annotation(text="hello", extra={"speaker": "x"}).to_json()) == {
        "text": "hello",
        "speaker": "x",
    }


def test_foreign_fields_are_kept_and_nulls_are_absent():
    annotation = Annotation.from_json(
        b'{"text": null, "label": 3, "esc50": true, "target": [1, 2]}'
    )
    assert (annotation.text, annotation.label) == ("", "3")
    assert annotation.extra == {"esc50": True, "target": [1, 2]}


@pytest.mark.parametrize("nothing", ["null", "NaN", '""', '" \\t"', "[]", '[NaN, ""]'])
def test_null_nan_and_blank_are_no_value_in_any_field(nothing: str):
    whole = '{"text": T, "label": T, "language": T, "duration_seconds": T, "genre": T, "id": 7}'
    annotation = Annotation.from_json(whole.replace("T", nothing).encode())
    assert annotation == Annotation(id="7")


@pytest.mark.parametrize("data", [b"[]", b'{"events": []}'])
def test_a_clip_without_events_keeps_its_empty_list(data: bytes):
    annotation = Annotation.from_json(data)
    assert annotation == Annotation(extra={"events": []})
    assert Annotation.from_json(annotation.to_json()) == annotation


def test_a_nan_given_by_a_program_is_no_value_either():
    assert not has_value(float("nan"))
    assert Annotation.from_mapping({"label": ["a", float("nan")]}).label == ["a"]


@pytest.mark.parametrize(
    ("data", "text", "texts"),
    [
        ('{"text": ["one", "two"]}', "one", ["one", "two"]),
        ('{"text": ["", "two"]}', "two", ["", "two"]),
        ('{"texts": ["one", "two"]}', "one", ["one", "two"]),
        ('{"caption": "a dog"}', "a dog", None),
        ('{"text": "", "transcript": "hello"}', "hello", None),
        ('{"text": 7, "caption": "a dog"}', "7", None),
        ('{"note": "x"}', "of the .txt", None),
        ('{"text": "own"}', "own", None),
    ],
)
def test_a_text_is_found_where_published_tars_keep_it(data: str, text: str, texts: list | None):
    annotation = Annotation.from_json(data.encode(), {"txt": "of the .txt"})
    assert (annotation.text, annotation.extra.get("texts")) == (text, texts)


@pytest.mark.parametrize("events", [[], [{"onset": 0.5, "offset": 1.5, "event_label": "Speech"}]])
def test_a_bare_list_is_that_of_a_clips_events_and_may_be_empty(events: list):
    assert Annotation.from_json(json.dumps(events).encode()) == Annotation(extra={"events": events})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "decode"),
        (b"[1]", "expected an object"),
        (b'{"text": {"en": "a"}}', "'text' must be text, not dict"),
        (b'{"text": [["a"]]}', "'text' must be text, not list"),
        (b'{"text": true}', "'text' must be text, not bool"),
        (b'{"captions": [false, "a dog"]}', "'text' must be text, not bool"),
        (b'{"text": "a", "language": false}', "'language' must be text, not bool"),
        (b'{"domain": "a b"}', "domain 'a b' is not a name such as speech, sound, music"),
        (b'{"label": {"a": 1}}', "'label' must be text"),
        (b'{"label": [["a"]]}', "'label' must be text"),
        (b'{"duration_seconds": -1}', "number of seconds"),
        (b'{"duration_seconds": Infinity}', "Infinity is not a JSON value"),
        (b'{"snr": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"duration_seconds": true}', "number of seconds"),
        (b'{"duration_seconds": 1e300}', "number of seconds"),
        (b'{"duration_seconds": 1%s}' % (b"0" * 400), "number of seconds"),
        (b"[" * 100_000, ""),
    ],
)
def test_bad_json_is_refused_with_its_cause(data: bytes, said: str):
    with pytest.raises(SkipSample) as refused:
        Annotation.from_json(data)
    assert refused.value.reason is SkipReason.BAD_JSON
    assert said in refused.value.detail


def test_json_beyond_the_limit_is_not_parsed():
    with pytest.raises(SkipSample) as refused:
        Annotation.from_json(b" " * (MAX_JSON_BYTES + 1))
    assert refused.value.reason is SkipReason.TOO_LARGE


def mapped(json_bytes: bytes, fields: dict[str, str], **members: str) -> Annotation:
    key = {KEY_FIELD: "clip-7", **members}
    return Annotation.from_json(json_bytes, key, FieldMapping(fields))


def test_fields_of_other_names_are_read_by_a_mapping():
    data = b'{"text": "wrong", "about": ["a dog", "barking"], "nr": 7, "tags": ["dog", "animal"]}'
    annotation = mapped(data, {"text": "about", "label": "tags", "id": KEY_FIELD, "source": "nr"})
    assert annotation.texts == ("a dog", "barking")
    assert (annotation.label, annotation.id) == (["dog", "animal"], "clip-7")
    assert annotation.source == "7"
    template = {"text": "{nr}: {tags}", "label": "cls", "language": "lang_of_speech"}
    annotation = mapped(data, template, cls=" 3\n", txt="unused")
    assert (annotation.texts, annotation.label) == (("7: dog, animal",), "3")
    assert annotation.language == ""


def test_a_mapping_can_ignore_a_field_and_read_one_of_the_wrong_type():
    data = b'{"text": {"en": "a"}, "domain": "n/a", "caption_en": "a cat"}'
    with pytest.raises(SkipSample):
        mapped(data, {})
    annotation = mapped(data, {"text": "caption_en", "domain": ""})
    assert (annotation.text, annotation.domain) == ("a cat", "")


def test_domains_are_names_in_any_case():
    assert Annotation.from_json(b'{"domain": "Speech"}').domain == "speech"
    assert Annotation.from_json(b'{"domain": "bioacoustics"}').domain == "bioacoustics"


def test_members_of_text_stand_in_for_a_json():
    annotation = Annotation.from_json(b"{}", {KEY_FIELD: "a", "txt": "a dog\n", "cls": "12\n"})
    assert (annotation.text, annotation.label) == ("a dog", "12")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_annotations_add_and_replace_fields_by_id_or_key(suffix: str, tmp_path: Path):
    rows = [
        {"id": "x", "captions": ["one", "two"], "label": "dog", "note": ""},
        {"id": "clip-7", "text": "by key"},
        {"id": "8", "instruction": "What is it?", "answer": "a cat"},
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
        pandas.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    mapping = FieldMapping({}, read_annotations(path))
    by_id = Annotation.from_json(
        b'{"id": "x", "text": "old", "texts": ["old", "older"], "note": "kept"}', None, mapping
    )
    assert (by_id.texts, by_id.label, by_id.extra["note"]) == (("one", "two"), "dog", "kept")
    members = {KEY_FIELD: "clip-7"}
    assert Annotation.from_json(b'{"text": "old"}', members, mapping).text == "by key"
    numbered = Annotation.from_json(
        b'{"id": "clip"}',
        members,
        FieldMapping(
            {},
            {
                "clip": {"text": "of the first clip with this id"},
                "clip-7": {"text": "of the seventh"},
            },
        ),
    )
    assert numbered.text == "of the seventh"
    number = Annotation.from_json(b'{"id": 8, "text": "kept"}', members, mapping)
    assert (number.text, number.answer) == ("kept", "a cat")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no annotations"),
        ("{", "row 1: not JSON"),
        ("[1]", "is one JSON array; expected one object a line"),
        ("1", "row 1: expected an object, found int"),
        ('{"text": "a"}', "row 1 has no id"),
        ('{"id": 1}\n{"id": "1"}', "row 2 has the id '1' of an earlier row"),
        ('{"id": 1, "licence": "MIT"}', "'licence', which only the shards can state"),
        (None, "cannot be read"),
    ],
)
def test_annotations_that_cannot_be_used_are_an_error(
    content: str | None, said: str, tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_annotations(path)
