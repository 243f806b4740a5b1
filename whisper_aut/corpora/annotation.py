"""The annotation of a clip: the `.json` member of a sample, or a row of a manifest, field by field.

Unknown fields are kept, so that tars published elsewhere (X-ARES, for one) read as they are. What
counts as a value, and where a text is looked for, is the same for tars and manifests.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from whisper_aut.corpora.template import Template
from whisper_aut.errors import Reason, SampleRefused

DOMAINS = ("speech", "sound", "music")
MAX_JSON_BYTES = 1 << 20
TEXT_FIELDS = ("text", "texts", "caption", "captions", "sentence", "transcript", "transcription")


@dataclass(frozen=True)
class Annotation:
    """The facts of one clip.

    Attributes:
        text: what the decoder learns to write: a transcript or a caption.
        domain: `speech`, `sound` or `music`; empty where the source, not the sample, says it.
        task: `asr`, `caption`, `tag`, `qa`, … (free; instructions are chosen by it).
        instruction, answer: a sample's own question and answer, used as they are.
        label: the class, or classes, of a probe task.
        language: of the speech; any code, tag or name that `corpora.languages` reads.
        duration_seconds: length of the clip as the builder measured it.
        source, id, licence: where the clip comes from, its name there, and on what terms (`license` is read too).
        extra: every other field of the JSON object that has a value.
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
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Annotation":
        """Check the fields of a sample.

        Null, NaN, blank text and an empty list are no value, in any field. Numbers become text
        where text is expected. Of a list of texts the first is taken; all of them stay in
        `extra["texts"]`.

        Raises:
            SampleRefused: a known field has the wrong type, or the domain is not one of `DOMAINS`.
        """
        given = {name: value for name, value in mapping.items() if has_value(value)}
        known = {f.name for f in fields(cls)} - {"extra"}
        if "licence" not in given and "license" in given:  # as others spell it
            license = given.pop("license")
            given["licence"] = license if isinstance(license, str) else json.dumps(license)
        given.pop("license", None)
        values: dict[str, Any] = {}
        for name in known & given.keys() - {"label", "duration_seconds"}:
            values[name] = _text(_first(given[name]) if name == "text" else given[name], name)
        if values.get("domain", "") not in ("", *DOMAINS):
            raise SampleRefused(
                Reason.BAD_JSON, f"domain {values['domain']!r} is not one of {', '.join(DOMAINS)}"
            )
        if "label" in given:
            values["label"] = _label(given["label"])
        if "duration_seconds" in given:
            values["duration_seconds"] = _seconds(given["duration_seconds"])
        extra = {name: value for name, value in given.items() if name not in known}
        if isinstance(texts := given.get("text"), list) and len(texts) > 1:
            extra.setdefault("texts", texts)
        return cls(**values, extra=extra)

    @classmethod
    def from_json(cls, data: bytes, text: str = "") -> "Annotation":
        """Parse and check a `.json` member; its text is in the first of `TEXT_FIELDS` with a value.

        Args:
            text: of a `.txt` member, for JSON that holds none.

        Raises:
            SampleRefused: larger than `MAX_JSON_BYTES`, not JSON, not an object, or a field of the wrong type.
        """
        if len(data) > MAX_JSON_BYTES:
            raise SampleRefused(Reason.TOO_LARGE, f"JSON of {len(data)} bytes")
        try:
            mapping = parse_json(data)
        except (ValueError, RecursionError) as error:
            raise SampleRefused(Reason.BAD_JSON, str(error)) from None
        if isinstance(mapping, list) and all(isinstance(event, dict) for event in mapping):
            return cls(
                extra={"events": mapping}
            )  # X-ARES's tars of sound events hold the bare list, empty where nothing happens
        if not isinstance(mapping, dict):
            raise SampleRefused(
                Reason.BAD_JSON, f"expected an object, found {type(mapping).__name__}"
            )
        found = find_text(mapping)
        return cls.from_mapping({**mapping, "text": found if has_value(found) else text})

    def told_by(self, template: Template) -> "Annotation":
        """Return the annotation with the text that a template over its fields gives."""
        own = {name: value for name, value in vars(self).items() if name != "extra"}
        return replace(self, text=template.fill({**self.extra, **own}))

    def without_text(self) -> str:
        """Return what to do about a missing text, for messages."""
        others = ", ".join(sorted(self.extra))
        return f"its fields: {others}; data.train[].text names the one to read" if others else ""

    def to_json(self) -> bytes:
        """Return the `.json` member: the fields that are set, one object, UTF-8."""
        own = {
            name: value
            for name, value in vars(self).items()
            if name != "extra" and value not in ("", None)
        }
        return json.dumps({**own, **self.extra}, ensure_ascii=False).encode()


def parse_json(data: bytes | str) -> Any:
    """Parse JSON in which a bare NaN, as Python and pandas write it, is null.

    Raises:
        ValueError: not JSON; infinities are none.
    """
    return json.loads(data, parse_constant=_constant)


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no JSON value")


def has_value(value: Any) -> bool:
    """Tell a value from null, NaN, blank text, and a list of nothing else."""
    if isinstance(value, list):
        return any(map(has_value, value))
    return (
        value is not None and value == value and not (isinstance(value, str) and not value.strip())
    )


def find_text(mapping: Mapping[str, Any]) -> Any:
    """Return the first of `TEXT_FIELDS` that has a value."""
    return next((mapping[name] for name in TEXT_FIELDS if has_value(mapping.get(name))), None)


def _first(value: Any) -> Any:
    return next(filter(has_value, value)) if isinstance(value, list) else value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise SampleRefused(Reason.BAD_JSON, f"{name!r} must be text, not {type(value).__name__}")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON's `\\ud800` parses, and then kills whatever encodes it
        raise SampleRefused(
            Reason.BAD_JSON, f"{name!r} holds half a surrogate pair, which is no character"
        ) from None
    return text


def _label(value: Any) -> str | list[str]:
    if isinstance(value, list):
        return [_text(item, "label") for item in value if has_value(item)]
    return _text(value, "label")


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
