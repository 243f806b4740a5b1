"""Read and check the annotation of a clip: the `.json` member of a sample, or a manifest row.

Unknown fields are kept, so tars published elsewhere (such as those of X-ARES) can be read
unchanged. Tars and manifests share the rules for empty values and for finding the text.
"""

import csv
import json
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any

from whisper_aut.errors import SkipReason, SkipSample, UserError, nearest


def plain(value: Any) -> str:
    """Return a cell as text: empty for null, comma-separated for a list."""
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    return "" if value is None else str(value)


def text_template(value: str) -> "Template":
    """Parse a template; a value without braces is the name of a single column."""
    return Template(value if "{" in value else f"{{{value}}}")


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
                    self.fault = f"the field of {column!r} is not understood"
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


DOMAINS = ("speech", "sound", "music")
MAX_JSON_BYTES = 1 << 20
TEXT_FIELDS = ("text", "texts", "caption", "captions", "sentence", "transcript", "transcription")


@dataclass(frozen=True)
class Annotation:
    """The annotation of one clip.

    Attributes:
        text: the transcript or caption that the decoder is trained to predict.
        domain: `speech`, `sound` or `music`; empty if the source sets it instead of the sample.
        task: `asr`, `caption`, `tag`, `qa`, or any other name; selects the instruction.
        instruction, answer: the sample's own question and answer, used unchanged.
        label: the class or classes for a probe task.
        language: the spoken language; any code, tag or name that `data.languages` understands.
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

        In every field, null, NaN, blank text and empty lists count as missing. Numbers become text
        where text is expected. If `text` is a list, its first item is used and the whole list is
        kept in `extra["texts"]`.

        Raises:
            SkipSample: a known field has the wrong type, or the domain is not one of `DOMAINS`.
        """
        given = {name: value for name, value in mapping.items() if has_value(value)}
        known = {f.name for f in fields(cls)} - {"extra"}
        if "licence" not in given and "license" in given:
            license = given.pop("license")
            given["licence"] = license if isinstance(license, str) else json.dumps(license)
        given.pop("license", None)
        values: dict[str, Any] = {}
        for name in known & given.keys() - {"label", "duration_seconds"}:
            values[name] = _text(_first(given[name]) if name == "text" else given[name], name)
        if values.get("domain", "") not in ("", *DOMAINS):
            raise SkipSample(
                SkipReason.BAD_JSON,
                f"domain {values['domain']!r} is not one of {', '.join(DOMAINS)}",
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
        """Parse and check a `.json` member. The text is the first non-empty field of `TEXT_FIELDS`.

        Args:
            data: the JSON, UTF-8.
            text: text of the `.txt` member, used if the JSON has none.

        Raises:
            SkipSample: the member is larger than `MAX_JSON_BYTES`, is not a JSON object, or has
                a field of the wrong type.
        """
        if len(data) > MAX_JSON_BYTES:
            raise SkipSample(SkipReason.TOO_LARGE, f"JSON of {len(data)} bytes")
        try:
            mapping = parse_json(data)
        except (ValueError, RecursionError) as error:
            raise SkipSample(SkipReason.BAD_JSON, str(error)) from None
        if isinstance(mapping, list) and all(isinstance(event, dict) for event in mapping):
            # X-ARES's sound event tars hold a bare list of events, empty for clips without any.
            return cls(extra={"events": mapping})
        if not isinstance(mapping, dict):
            raise SkipSample(
                SkipReason.BAD_JSON, f"expected an object, found {type(mapping).__name__}"
            )
        found = find_text(mapping)
        return cls.from_mapping({**mapping, "text": found if has_value(found) else text})

    def with_text(self, template: Template) -> "Annotation":
        """Return a copy whose text is `template` filled with the annotation's fields."""
        own = {name: value for name, value in vars(self).items() if name != "extra"}
        return replace(self, text=template.fill({**self.extra, **own}))

    def missing_text_hint(self) -> str:
        """Return a hint for error messages about a missing text: the fields that could hold it."""
        others = ", ".join(sorted(self.extra))
        return f"its fields: {others}; data.train[].text names the one to read" if others else ""

    def to_json(self) -> bytes:
        """Return the `.json` member: a UTF-8 JSON object with all fields that are set."""
        own = {
            name: value
            for name, value in vars(self).items()
            if name != "extra" and value not in ("", None)
        }
        return json.dumps({**own, **self.extra}, ensure_ascii=False).encode()


def parse_json(data: bytes | str) -> Any:
    """Parse JSON, reading a bare NaN, as Python and pandas write it, as null.

    Raises:
        ValueError: `data` is not JSON, or holds an infinity.
    """
    return json.loads(data, parse_constant=_constant)


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no JSON value")


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


def _first(value: Any) -> Any:
    return next(filter(has_value, value)) if isinstance(value, list) else value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise SkipSample(SkipReason.BAD_JSON, f"{name!r} must be text, not {type(value).__name__}")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # `\\ud800` is valid JSON, but encoding it fails later
        raise SkipSample(
            SkipReason.BAD_JSON, f"{name!r} holds half a surrogate pair, which is no character"
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
    raise SkipSample(
        SkipReason.BAD_JSON, f"'duration_seconds' must be a number of seconds, not {value!r}"
    )


DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl", ".json")

Row = dict[str, Any]


def check_table(path: Path) -> None:
    """Check that `path` is a file whose suffix is one of `TABLE_SUFFIXES`.

    Raises:
        UserError: there is no such file, or its suffix is not supported.
    """
    if not path.exists():
        there = (
            sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in TABLE_SUFFIXES)
            if path.parent.is_dir()
            else []
        )
        listed = f" There: {', '.join(there[:10])}." if there else ""
        raise UserError(
            f"There is no manifest {path.absolute()}.{nearest(path.name, there)}{listed}"
        )
    if not path.is_file() or path.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(
            f"{path} is not a manifest: expected a file that ends in {', '.join(TABLE_SUFFIXES)}."
        )


def read_columns(path: Path) -> tuple[str, ...]:
    """Return the names of all columns in order of appearance.

    Raises:
        UserError: the file has no readable row.
    """
    columns, number, fault = {}, 0, ""
    for number, row in read_rows(path):
        if isinstance(row, str):
            fault = fault or f" Line {number}: {row}."
            continue
        columns.update(dict.fromkeys(row))
        if path.suffix.lower() in DELIMITERS:
            break  # the header line names all columns
    if not columns:
        raise UserError(
            f"{path} holds {'no row that can be read' if number else 'no rows'}.{fault}"
        )
    return tuple(columns)


def read_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Yield `(line number, row)`. For an unreadable row, yield an error message instead of the row.

    Columns without a name are dropped, such as the index that pandas writes first.

    Raises:
        UserError: the file cannot be parsed: it is not UTF-8, its header is unreadable or repeats
            a column, a quote is never closed, or it is one JSON array.
    """
    delimiter = DELIMITERS.get(path.suffix.lower())
    return _json_rows(path) if delimiter is None else _csv_rows(path, delimiter)


def _json_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise UserError(
                f"{path} is one JSON array; expected one object a line. Convert it: "
                f"jq -c '.[]' {path.name} > rows.jsonl"
            )
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON: {error}"
        else:
            if isinstance(row, dict):
                yield number, {name: value for name, value in row.items() if name}
            else:
                yield number, f"expected an object, found {type(row).__name__}"


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Row | str]]:
    csv.field_size_limit(MAX_JSON_BYTES)
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(_lines(path), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not header:
                raise UserError(f"The header line of {path} cannot be read: {error}.") from None
            # An unclosed quote swallows all rows that follow.
            if "unexpected end of data" in str(error):
                raise UserError(
                    f"A quote in the row that begins at line {start} of {path} is never closed."
                ) from None
            yield reader.line_num, str(error)
            continue
        if not cells:
            continue
        if not header:
            header = _checked_header(path, cells)
        elif len(cells) != len(header):
            yield reader.line_num, f"{len(cells)} cells where the header has {len(header)}"
        else:
            cells_of = zip(header, cells, strict=True)
            yield reader.line_num, {name: cell for name, cell in cells_of if name}


def _checked_header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise UserError(f"{path} has the column {twice[0]!r} twice. Rename one of them.")
    return header


def read_lines(path: Path) -> list[str]:
    """Return the non-blank lines of a UTF-8 file, split at `\\n` and `\\r\\n` only.

    `str.splitlines` also splits at U+0085, U+2028 and others, which captions may contain.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        return [line for line in (line.strip(" \t\r\n") for line in file) if line]


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                guess = "UTF-16" if raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "LATIN1"
                raise UserError(
                    f"Line {number} of {path} is not UTF-8 (byte 0x{raw[error.start]:02x}). "
                    f"Convert it, for instance from {guess}: "
                    f"iconv -f {guess} -t UTF-8 {path.name} > utf8{path.suffix}"
                ) from None
