import json

import pytest

from whisper_aut.data.annotation import MAX_JSON_BYTES, Annotation, has_value
from whisper_aut.errors import SkipReason, SkipSample


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
    annotation = Annotation.from_json(data.encode(), "of the .txt")
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
        (b'{"domain": "noise"}', "not one of speech, sound, music"),
        (b'{"label": {"a": 1}}', "'label' must be text"),
        (b'{"label": [["a"]]}', "'label' must be text"),
        (b'{"duration_seconds": -1}', "number of seconds"),
        (b'{"duration_seconds": Infinity}', "Infinity is not a JSON value"),
        (b'{"snr": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"duration_seconds": true}', "number of seconds"),
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
