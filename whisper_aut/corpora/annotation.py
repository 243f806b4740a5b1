"""What is written beside a clip: the `.json` member of a shard's sample.

In: a JSON object, from a shard or made by a corpus builder. Out: an `Annotation`, checked field by field. Next:
`corpora.shards` writes it, `data.sample` reads it, `data.text` turns it into tokens. Unknown fields are kept, so that tars
published elsewhere (X-ARES, for one) read as they are.
"""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from whisper_aut.errors import Reason, SampleRefused

DOMAINS = ("speech", "sound", "music")
MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class Annotation:
    """The facts of one clip.

    Attributes:
        text: what the decoder learns to write: a transcript or a caption.
        domain: `speech`, `sound` or `music`; empty where the source, not the sample, says it.
        task: `asr`, `caption`, `tag`, `qa`, … (free; instructions are chosen by it).
        instruction, answer: a sample's own question and answer, used as they are.
        label: the class, or classes, of a probe task.
        language: ISO 639-1 code of the speech.
        duration_seconds: length of the clip as the builder measured it.
        source, id, licence: where the clip comes from, its name there, and on what terms (`license` is read too).
        extra: every other field of the JSON object.
    """

    text: str = ""
    domain: str = ""
    task: str = ""
    instruction: str = ""
    answer: str = ""
    label: str | list[str] | None = None
    language: str = ""
    duration_seconds: float | None = None
    source: str = ""
    id: str = ""
    licence: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> "Annotation":
        """Check a JSON object's fields.

        Raises:
            SampleRefused: a known field has the wrong type, or the domain is not one of `DOMAINS`.
        """
        known = {f.name for f in fields(cls)} - {"extra"}
        values = {
            name: value for name, value in mapping.items() if name in known and value is not None
        }
        if not values.get("licence") and (license := mapping.get("license")):  # as others spell it
            values["licence"] = license if isinstance(license, str) else json.dumps(license)
        for name in known & values.keys() - {"label", "duration_seconds"}:
            if not isinstance(values[name], str):
                raise SampleRefused(
                    Reason.BAD_JSON, f"{name!r} must be text, not {type(values[name]).__name__}"
                )
            if not _is_unicode(values[name]):
                raise SampleRefused(
                    Reason.BAD_JSON, f"{name!r} holds half a surrogate pair, which is no character"
                )
        if values.get("domain", "") not in ("", *DOMAINS):
            raise SampleRefused(
                Reason.BAD_JSON, f"domain {values['domain']!r} is not one of {', '.join(DOMAINS)}"
            )
        if "label" in values:
            values["label"] = _label(values["label"])
        if "duration_seconds" in values:
            values["duration_seconds"] = _seconds(values["duration_seconds"])
        return cls(
            **values,
            extra={
                name: value
                for name, value in mapping.items()
                if name not in known and name != "license"
            },
        )

    @classmethod
    def from_json(cls, data: bytes) -> "Annotation":
        """Parse and check a `.json` member.

        Raises:
            SampleRefused: larger than `MAX_JSON_BYTES`, not JSON, not an object, or a field of the wrong type.
        """
        if len(data) > MAX_JSON_BYTES:
            raise SampleRefused(Reason.TOO_LARGE, f"JSON of {len(data)} bytes")
        try:
            mapping = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SampleRefused(Reason.BAD_JSON, str(error)) from None
        if isinstance(mapping, list) and all(isinstance(event, dict) for event in mapping):
            mapping = {
                "events": mapping
            }  # X-ARES's tars of sound events hold the bare list, empty where nothing happens
        if not isinstance(mapping, dict):
            raise SampleRefused(
                Reason.BAD_JSON, f"expected an object, found {type(mapping).__name__}"
            )
        return cls.from_mapping(mapping)

    def to_json(self) -> bytes:
        """Return the `.json` member: the fields that are set, one object, UTF-8."""
        own = {
            name: value
            for name, value in vars(self).items()
            if name != "extra" and value not in ("", None)
        }
        return json.dumps({**own, **self.extra}, ensure_ascii=False).encode()


def _is_unicode(text: str) -> bool:
    """Tell whether a text can be written at all: JSON's `\\ud800` parses, and then kills whatever encodes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label(value: Any) -> str | list[str]:
    if isinstance(value, list):
        return [_class_name(item) for item in value]
    return _class_name(value)


def _class_name(value: Any) -> str:
    if isinstance(value, (str, int, float)) and _is_unicode(str(value)):
        return str(value)
    raise SampleRefused(
        Reason.BAD_JSON, f"'label' must be text or a list of texts, not {type(value).__name__}"
    )


def _seconds(value: Any) -> float:
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value < float("inf")
    ):
        return float(value)
    raise SampleRefused(
        Reason.BAD_JSON, f"'duration_seconds' must be a number of seconds, not {value!r}"
    )
