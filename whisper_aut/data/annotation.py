"""The annotation of a clip: the `.json` member of a sample, or a row of a manifest.

Unknown fields are kept, so tars published elsewhere (such as those of X-ARES) can be read
unchanged. Tars and manifests share the rules for empty values and for finding the text.

Language tags of any corpus are mapped to Whisper's codes and names: `de`, `deu`, `ger`, `de-AT`,
`deu_Latn`, `de_DE.UTF-8` and `German` all mean German. The tables are ISO 639-3 with names,
macrolanguages and retired codes (https://iso639-3.sil.org), and Whisper's own codes and synonyms.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from itertools import takewhile
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from whisper_aut.audio.decode import TRIM_SECONDS
from whisper_aut.errors import SkipReason, SkipSample
from whisper_aut.utils import parse_json

if TYPE_CHECKING:
    from iso639 import Language

DOMAINS = ("speech", "sound", "music")  # those of the papers; a config may name others
DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_]*")
MAX_JSON_BYTES = 1 << 20
MAX_SECONDS = 1e9  # fits into sample tables
Row = dict[str, Any]
MAX_KEY_CHARACTERS = 100
KEY_FIELD = "__key__"  # the key of a sample, for `FieldMapping`
TEXT_MEMBERS = ("txt", "cls")  # members of a sample that hold its text and its class
TEXT_FIELDS = ("text", "texts", "caption", "captions", "sentence", "transcript", "transcription")


@dataclass(frozen=True)
class Annotation:
    """The annotation of one clip.

    Attributes:
        text: the transcript or caption that the decoder is trained to predict.
        domain: `speech`, `sound`, `music` or another one of the config, in lower case; empty if the
            source sets it instead of the sample.
        task: `asr`, `caption`, `tag`, `qa`, or any other name; selects the instruction.
        instruction, answer: the sample's own question and answer, used unchanged.
        label: the class or classes for a probe task.
        language: the spoken language; any code, tag or name that `whisper_codes` understands.
        duration_seconds: length of the clip as measured when it was built.
        source, id, licence: the corpus, the clip's name in it, and its licence (`license` is read
            too).
        extra: all other non-empty fields of the JSON object.
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
        """Build an annotation from the fields of a sample and check them.

        In every field, null, NaN, blank text and empty lists count as missing, but an empty list
        of `events` is kept. Numbers become text where text is expected. If `text` is a list, its
        first item is used and the whole list is kept in `extra["texts"]`, see `texts`.

        Raises:
            SkipSample: a known field has the wrong type, or the domain is not a plain name.
        """
        given = {
            name: value
            for name, value in mapping.items()
            if has_value(value) or (name == "events" and value == [])
        }
        known = {f.name for f in fields(cls)} - {"extra"}
        if (license := given.pop("license", None)) is not None:
            written = license if isinstance(license, str) else json.dumps(license)
            given.setdefault("licence", written)
        if isinstance(texts := given.get("text"), list):
            given["text"] = next(filter(has_value, texts))
            if len(texts) > 1:
                given.setdefault("texts", texts)
        values: dict[str, Any] = {}
        for name in known & given.keys() - {"label", "duration_seconds"}:
            values[name] = _text(given[name], name)
        domain = values["domain"] = values.get("domain", "").lower()
        if domain and not DOMAIN_NAME.fullmatch(domain):
            raise _bad_json(f"domain {domain!r} is not a name such as {', '.join(DOMAINS)}")
        if "label" in given:
            values["label"] = _label(given["label"])
        if "duration_seconds" in given:
            values["duration_seconds"] = _seconds(given["duration_seconds"])
        extra = {name: value for name, value in given.items() if name not in known}
        return cls(**values, extra=extra)

    @classmethod
    def from_json(
        cls,
        data: bytes,
        members: Mapping[str, str] | None = None,
        mapping: "FieldMapping | None" = None,
    ) -> "Annotation":
        """Parse and check a `.json` member. The text is the first non-empty field of `TEXT_FIELDS`.

        Args:
            data: the member.
            members: the sample's key as `KEY_FIELD`, and its `TEXT_MEMBERS`: the text and the label
                that are used if the JSON has none.
            mapping: where else to read fields from.

        Raises:
            SkipSample: the member is larger than `MAX_JSON_BYTES`, is not a JSON object, or has
                a field of the wrong type.
        """
        if len(data) > MAX_JSON_BYTES:
            raise SkipSample(SkipReason.TOO_LARGE, f"JSON of {len(data)} bytes")
        try:
            row = parse_row(data)
        except ValueError as error:
            raise _bad_json(str(error)) from None
        if isinstance(row, list) and all(isinstance(event, dict) for event in row):
            # X-ARES's sound event tars hold a bare list of events, empty for clips without any.
            row = {"events": row}
        if not isinstance(row, dict):
            raise _bad_json(f"expected an object, found {type(row).__name__}")
        members = members or {}
        row = mapping.apply(row, members) if mapping else row
        found, label = find_text(row), row.get("label")
        texts = {
            "text": found if has_value(found) else members.get("txt", ""),
            "label": label if has_value(label) else members.get("cls", "").strip(),
        }
        return cls.from_mapping({**row, **texts})

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the clip, such as several captions: `text` and those in `extra["texts"]`."""
        others = self.extra.get("texts")
        listed = others if isinstance(others, list) else []
        return tuple(dict.fromkeys(filter(None, [self.text, *map(_plain_text, listed)])))

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the instruction, the answer, the label and the longest of `texts`."""
        label = self.label if isinstance(self.label, str) else " ".join(self.label or ())
        parts = (self.instruction, self.answer, label, max(self.texts, key=len, default=""))
        return sum(len(part.encode(errors="replace")) for part in parts)

    def draw_text(self, position: int) -> "Annotation":
        """Return a copy with one of `texts`, drawn by the clip's position in the order."""
        if len(self.texts) < 2:
            return self
        # Seeded with a string: unlike `hash`, it gives the same result in every process.
        rng = random.Random(f"text {position} {self.source} {self.id}")
        return replace(self, text=rng.choice(self.texts))

    def draw_chunk(
        self, max_seconds: float, position: int
    ) -> "tuple[Annotation, tuple[float, float]] | None":
        """Draw consecutive `segments` of a long recording that last at most `max_seconds`.

        `extra["segments"]` is a list of `{"start": seconds, "end": seconds, "text": …}`. The first
        segment is drawn by the clip's position in the order.

        Returns:
            The annotation of the chunk, and its start and duration in seconds; None if the
            recording is at most `TRIM_SECONDS` longer, or has no segments that fit.

        Raises:
            SkipSample: the segments have another form.
        """
        if not (listed := self.extra.get("segments")):
            return None
        try:
            segments = [
                (float(one["start"]), float(one["end"]), _plain_text(one["text"])) for one in listed
            ]
        except (TypeError, KeyError, ValueError, OverflowError):
            raise _bad_json("'segments' must list objects with start, end and text") from None
        seconds = self.duration_seconds or max(end for _, end, _ in segments)
        if seconds <= max_seconds + TRIM_SECONDS:
            return None

        def fits(segment: tuple[float, float, str], start: float) -> bool:
            return 0 <= segment[0] < segment[1] <= start + max_seconds

        segments.sort()
        firsts = [number for number, one in enumerate(segments) if fits(one, one[0])]
        if not firsts:
            return None
        first = random.Random(f"chunk {position} {self.source} {self.id}").choice(firsts)
        start = segments[first][0]
        # It ends before a segment without a length, whose words may be anywhere.
        chosen = list(takewhile(lambda one: fits(one, start), segments[first:]))
        text = " ".join(filter(None, (words for *_, words in chosen)))
        extra = {name: value for name, value in self.extra.items() if name != "texts"}
        end = max(end for _, end, _ in chosen)
        return replace(self, text=text, extra=extra), (start, end - start)

    def missing_text_hint(self) -> str:
        """Return a hint for error messages about a missing text: the fields that could hold it."""
        others = ", ".join(sorted(self.extra))
        return f"its fields: {others}; data.train[].text names the one to read" if others else ""

    def to_json(self) -> bytes:
        """Return the `.json` member: a UTF-8 JSON object with all fields that are set."""
        own = {name: value for name, value in vars(self).items() if value not in ("", None)}
        return json.dumps(own | own.pop("extra"), ensure_ascii=False).encode()


@dataclass(frozen=True, eq=False)
class FieldMapping:
    """Where the annotations of a source are read from, if not from fields of the usual names.

    Attributes:
        fields: for a field of the annotation, the field of the JSON that holds it, or a template
            over such fields. `KEY_FIELD` is the sample's key, and `TEXT_MEMBERS` are the texts of
            these members. An empty name ignores the field.
        rows: by id or key of a sample, fields that are added to it or replace its own.
        task: replaces the `task` of all samples, unless it is empty.
        audio_only: whether samples may lack all members of text, as also with `rows`.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Row] = field(default_factory=dict)
    task: str = ""
    audio_only: bool = False

    def apply(self, row: Row, members: Mapping[str, str]) -> Row:
        """Return the fields of a sample under the names of an annotation.

        Args:
            row: the fields of the JSON.
            members: the sample's key and text members, see `Annotation.from_json`.
        """
        found, given = dict(row), {**members, **row}
        if "text" in self.fields:
            found = _without_texts(found)
        for name, source in self.fields.items():
            template = _parsed(source) if "{" in source else None
            found[name] = template.fill(given) if template else given.get(source)
        id, key = plain(found.get("id")), members.get(KEY_FIELD, "")
        # `data build` numbers the keys of clips with the same id.
        names = (key, id) if key.startswith(f"{safe_name(id)}-") else (id, key)
        other = next((self.rows[name] for name in names if self.rows.get(name)), {})
        found = {**(_without_texts(found) if find_text(other) else found), **other}
        return {**found, "task": self.task} if self.task else found


AUDIO_ONLY = FieldMapping(audio_only=True)


def _bad_json(detail: str) -> SkipSample:
    return SkipSample(SkipReason.BAD_JSON, detail)


def _without_texts(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in TEXT_FIELDS}


def parse_row(data: bytes | str) -> Any:
    """Parse the JSON of a row. A bare NaN, as Python and pandas write it, is null.

    Raises:
        ValueError: `data` is not JSON, or holds an infinity.
    """
    return parse_json(data, parse_constant=_constant)


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON value")


def has_value(value: Any) -> bool:
    """Return False for null, NaN, blank text, and lists that hold nothing else."""
    if isinstance(value, list):
        return any(map(has_value, value))
    return (
        value is not None and value == value and not (isinstance(value, str) and not value.strip())
    )


def find_text(mapping: Mapping[str, Any]) -> Any:
    """Return the first non-empty field of `TEXT_FIELDS`, or None."""
    return next((mapping[name] for name in TEXT_FIELDS if has_value(mapping.get(name))), None)


def _text(value: Any, name: str) -> str:
    is_flag = isinstance(value, bool) and name != "label"
    if is_flag or not isinstance(value, (str, int, float)):
        raise _bad_json(f"{name!r} must be text, not {type(value).__name__}")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # `\\ud800` is valid JSON, but encoding it fails later
        raise _bad_json(f"{name!r} has half of a surrogate pair, no character") from None
    return text


def _plain_text(value: Any) -> str:
    """Return one of several texts, or an empty string if it is none."""
    try:
        return _text(value, "texts") if has_value(value) else ""
    except SkipSample:
        return ""


def _label(value: Any) -> str | list[str]:
    if isinstance(value, list):
        return [_text(item, "label") for item in value if has_value(item)]
    return _text(value, "label")


def _seconds(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 <= value <= MAX_SECONDS:
        return float(value)
    raise _bad_json(f"'duration_seconds' must be a number of seconds, not {value!r:.40}")


def plain(value: Any) -> str:
    """Return a cell as text: empty for null and NaN, comma-separated for a list."""
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value if has_value(item))
    return "" if value is None or value != value else str(value)


def safe_name(name: str) -> str:
    """Make a name safe as a tar key and as a folder.

    It has no dot, because WebDataset treats everything after the first dot as the extension.
    """
    return re.sub(r"[^\w-]+", "_", name).strip("_")[:MAX_KEY_CHARACTERS]


class Template(Formatter):
    """A `str.format` template over the columns of a row.

    Fields are column names, without attributes or indices. The only format is `words`, which
    replaces underscores with spaces.

    Attributes:
        columns: the columns that the template uses.
        fault: why the template is invalid; empty if it is valid.
    """

    def __init__(self, template: str):
        self.template, self.columns, self.fault = template, [], ""
        try:
            for _, column, spec, conversion in self.parse(template):
                if column is None:
                    continue
                self.columns.append(column)
                if not column or spec not in ("", "words") or conversion:
                    self.fault = f"the field {column!r} is not supported"
        except ValueError as error:
            self.fault = str(error)

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text, or an empty string if a column that the template uses is empty."""
        if not all(plain(row.get(column)).strip() for column in self.columns):
            return ""
        return self.vformat(self.template, (), row)

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        text = plain(value).strip()
        return " ".join(text.replace("_", " ").split()) if format_spec == "words" else text


_parsed = lru_cache(maxsize=256)(Template)


def read_lines(path: Path) -> list[str]:
    """Return the non-blank lines of a UTF-8 file, split at `\\n` and `\\r\\n` only.

    `str.splitlines` also splits at U+0085, U+2028 and others, which captions may contain.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        return [line for line in (line.strip(" \t\r\n") for line in file) if line]


# Two-letter codes withdrawn from ISO 639-1. The tables only have retired three-letter codes.
WITHDRAWN = {"in": "id", "iw": "he", "ji": "yi", "jw": "jv", "mo": "ro"}
# Where Whisper deviates from ISO 639: it writes `jw` for Javanese, and its Tagalog was trained and
# tested on Filipino.
WHISPER_CODES = {"jv": "jw", "fil": "tl"}
COLLOQUIAL = {"farsi": "fa", "cantonese": "yue", "slovene": "sl", "kiswahili": "sw"}
# BCP 47 (language, extended language, script, region, variants), FLORES (`deu_Latn`) and POSIX
# (`de_DE.UTF-8@euro`).
TAG = re.compile(
    r"(?P<language>[a-z]{2,3})(?:[-_](?P<extended>[a-z]{3}))?(?:[-_][a-z]{4})?"
    r"(?:[-_](?:[a-z]{2}|\d{3})(?:-\w{4,8})*)?(?:-[a-z]-[\w-]+)?(?:\.[\w-]+)?(?:@\w+)?"
)


@lru_cache(maxsize=4096)
def whisper_codes(tag: str) -> tuple[str, ...]:
    """Return Whisper's codes for a language, closest first; empty if Whisper does not support it.

    The code of the macrolanguage is included, because earlier Whisper models without `yue` were
    trained on Cantonese as `zh`.

    Args:
        tag: an ISO 639 code of any part, a BCP 47 tag, a locale, or an English name, in any case.

    Examples:
        >>> [whisper_codes(tag) for tag in ("deu", "nb-NO", "zh-yue", "Javanese", "tlh")]
        [('de',), ('no',), ('yue', 'zh'), ('jw',), ()]
    """
    tag = tag.strip().lower()
    names, synonyms = _whisper_names()
    known = [synonyms.get(name, name) for name in (tag, _without_brackets(tag))]
    closest = [code for code in known if code in names]
    language = _find_language(closest[0] if closest else tag)
    others = [code for code in _codes_of(language) if code in names] if language else []
    return tuple(dict.fromkeys([*closest, *others]))


@lru_cache(maxsize=4096)
def language_name(tag: str) -> str:
    """Return the English name of a language, or an empty string if the tag is unknown.

    Tags are those of `whisper_codes`. Whisper's name is preferred to that of ISO 639.

    Examples:
        >>> [language_name(tag) for tag in ("et", "fra", "zh-yue", "ceb", "Klingon", "xq")]
        ['Estonian', 'French', 'Cantonese', 'Cebuano', 'Klingon', '']
    """
    if codes := whisper_codes(tag):
        return _whisper_names()[0][codes[0]].title()
    language = _find_language(tag.strip().lower())
    if language is None or language.type == "S":  # ISO 639's special codes, such as `und`, `mul`
        return ""
    return _without_brackets(language.name)


def _find_language(name: str) -> "Language | None":
    """Look up a lower-case code, name or tag in the tables of ISO 639."""
    tag = TAG.fullmatch(name)
    if tag and (tag["language"] == name or (found := _match(name)) is None):
        found = _match(WITHDRAWN.get(tag["language"], tag["language"]))
        extended = _match(tag["extended"] or "")
        # `zh-yue` is Cantonese. In `eng-USA`, the three letters are a country.
        if found and extended and extended.macrolanguage == found.part3:
            return extended
        return found
    return _match(name) or _match(_without_brackets(name))


def _match(name: str) -> "Language | None":
    from iso639 import Language, LanguageNotFoundError

    try:
        return Language.match(name, strict_case=False) if name else None
    except LanguageNotFoundError:
        return None


def _codes_of(language: "Language") -> Iterator[str]:
    from iso639 import Language

    for code in (language.part1, language.part3):
        if code:
            yield WHISPER_CODES.get(code, code)
    for wider in (language.retire_change_to, language.macrolanguage):
        if wider:
            yield from _codes_of(Language.from_part3(wider))


def _without_brackets(name: str) -> str:
    """Remove text in brackets: `Waray (Philippines)` becomes `Waray`."""
    return re.sub(r"\s*\(.*\)", "", name).strip()


@cache
def _whisper_names() -> tuple[dict[str, str], dict[str, str]]:
    """Return Whisper's tables: code to name, and name or synonym to code."""
    # Imported here because it is slow and many commands do not need it.
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    return LANGUAGES, TO_LANGUAGE_CODE | COLLOQUIAL
