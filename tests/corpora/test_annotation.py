import json

import pytest

from whisper_aut.corpora.annotation import MAX_JSON_BYTES, Annotation
from whisper_aut.errors import Reason, SampleRefused


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


@pytest.mark.parametrize("events", [[], [{"onset": 0.5, "offset": 1.5, "event_label": "Speech"}]])
def test_a_bare_list_is_that_of_a_clips_events_and_may_be_empty(events: list):
    assert Annotation.from_json(json.dumps(events).encode()) == Annotation(extra={"events": events})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "decode"),
        (b"[1]", "expected an object"),
        (b'{"text": 3}', "'text' must be text, not int"),
        (b'{"domain": "noise"}', "not one of speech, sound, music"),
        (b'{"label": {"a": 1}}', "'label' must be text"),
        (b'{"label": [["a"]]}', "'label' must be text"),
        (b'{"duration_seconds": -1}', "number of seconds"),
        (b'{"duration_seconds": Infinity}', "number of seconds"),
        (b'{"duration_seconds": true}', "number of seconds"),
        (b"[" * 100_000, ""),
    ],
)
def test_bad_json_is_refused_with_its_cause(data: bytes, said: str):
    with pytest.raises(SampleRefused) as refused:
        Annotation.from_json(data)
    assert refused.value.reason is Reason.BAD_JSON
    assert said in refused.value.detail


def test_json_beyond_the_limit_is_not_parsed():
    with pytest.raises(SampleRefused) as refused:
        Annotation.from_json(b" " * (MAX_JSON_BYTES + 1))
    assert refused.value.reason is Reason.TOO_LARGE
