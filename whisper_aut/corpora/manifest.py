"""Read a manifest, a table of audio files and texts, into one checked entry per clip.

The table is CSV, TSV, JSON Lines (of lhotse's cuts too), parquet or Arrow, or a folder of the last
two: a Hugging Face dataset. A `ManifestSpec` says what its columns mean.
"""

import csv
import gzip
import json
import math
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

from whisper_aut.data.annotation import (
    DOMAIN_NAME,
    DOMAINS,
    MAX_JSON_BYTES,
    TEXT_FIELDS,
    Annotation,
    Row,
    Template,
    find_text,
    has_value,
    parse_row,
    plain,
    safe_name,
)
from whisper_aut.errors import SkipReason, SkipSample, UserError, nearest, require
from whisper_aut.schema import Text
from whisper_aut.utils import parse_json

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ARROW_SUFFIXES = (".parquet", ".arrow")
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl", ".json", ".jsonl.gz", *ARROW_SUFFIXES)
ARROW_ROWS = 64  # that are in memory at once, with their audio
AUDIO_COLUMNS = (
    *("audio", "path", "file", "filename"),
    *("audio_path", "wav", "audio_filepath", "file_name"),
)
OFFSET_COLUMN, DURATION_COLUMN = "offset", "duration"  # the names in NeMo manifests
ANNOTATION_COLUMNS = tuple(
    f.name for f in fields(Annotation) if f.name not in ("extra", "duration_seconds")
)
CONSTANTS = ("domain", "task", "language", "source", "licence")
MAX_LINE_BYTES = 64 << 20  # a .gz of a few kilobytes may hold a line of many gigabytes
# Each split keeps a tar open. A column with more values is unlikely to name splits.
MAX_SPLITS = 256

Reader = Callable[[Row], Any]


@dataclass(frozen=True)
class ManifestSpec:
    """A manifest and the meaning of its columns.

    Attributes:
        manifest: the table.
        audio_root: folder that relative audio paths start from; by default the manifest's own.
        audio: column with the path; by default the first of `AUDIO_COLUMNS` that exists.
        text: a column, or a template over columns such as `a {mood} tune`. `{category:words}`
            writes the underscores of a value as spaces. A row in which one of the template's
            columns is empty has no text. By default the first of `TEXT_FIELDS` that has a value in
            the row.
        label: column or template with the class; by default the column `label`.
        offset: column with the start of a clip in a longer file, in seconds; by default the column
            `offset` if it exists.
        duration: column with the duration of a clip in seconds; by default the column `duration`
            if clips have an offset. Without a duration, a clip ends where its file does.
        domain, task, language, source, licence: constants for all rows; they override columns of
            the same names.
        where: allowed values by column; other rows are dropped.
        split_by: column whose values each get their own folder of shards.
    """

    manifest: Text | Path
    audio_root: Text | Path = ""
    audio: Text = ""
    text: Text = ""
    label: Text = ""
    offset: Text = ""
    duration: Text = ""
    domain: Text = ""
    task: Text = ""
    language: Text = ""
    source: Text = ""
    licence: Text = ""
    where: Mapping[str, Sequence[Text]] = field(default_factory=dict)
    split_by: Text = ""


@dataclass(frozen=True)
class Segment:
    """A part of a file; `seconds` is its duration, or None for up to the end."""

    start_seconds: float
    seconds: float | None


@dataclass(frozen=True)
class Entry:
    """A manifest row that describes one clip."""

    line: int  # of the manifest, at which the row ends
    path: Path
    key: str  # unique in the manifest
    split: str  # folder that the clip goes to; "" without `split_by`
    annotation: Annotation
    segment: Segment | None = None  # the part of the file to use; None for all of it
    audio: bytes | None = None  # the encoded clip, if the table at `path` contains it


@dataclass(frozen=True)
class SkippedRow:
    """A manifest row that cannot be used."""

    line: int  # of the manifest, at which the row ends
    path: str  # as written or as resolved; empty if it could not be read
    reason: SkipReason
    detail: str = ""
    split: str = ""


class Manifest:
    """A manifest whose columns fit its spec; its rows can be read any number of times.

    Attributes:
        root: folder that relative audio paths start from.
        columns: names of all columns.
        audio: name of the column with the audio path.
        arrow_files: the files of the table, if they are parquet or Arrow.
        filtered_rows: number of rows that `where` dropped in the last pass.

    Raises:
        UserError: the file is missing, is not a table or has no rows, or the spec names a column
            or a domain that does not exist.
    """

    def __init__(self, spec: ManifestSpec):
        self.path = Path(spec.manifest)
        _check_table(self.path)
        if spec.domain and not DOMAIN_NAME.fullmatch(spec.domain):
            raise UserError(
                f"Domain {spec.domain!r} is not a name in lower case, such as {', '.join(DOMAINS)}."
            )
        self.spec, self.filtered_rows = spec, 0
        self._splits: dict[str, str] = {}
        folder = self.path if self.path.is_dir() else self.path.parent
        self.root = Path(spec.audio_root or folder).absolute()
        self.columns, self.arrow_files = read_columns(self.path), arrow_files(self.path)
        self.audio = self._column("audio", spec.audio, AUDIO_COLUMNS) or ""
        if not self.audio:
            raise self._missing_column("audio", AUDIO_COLUMNS)
        self._offset = self._column("offset", spec.offset, (OFFSET_COLUMN,))
        self._duration = self._column(
            "duration", spec.duration, (DURATION_COLUMN,) if self._offset else ()
        )
        self._text = self._text_reader("text", spec.text) if spec.text else find_text
        self._label = (
            self._text_reader("label", spec.label) if spec.label else (lambda row: row.get("label"))
        )
        if not (spec.text or spec.label or {*TEXT_FIELDS, "label", "answer"} & {*self.columns}):
            raise self._missing_column("text", (*TEXT_FIELDS, "label"))
        for column in (*spec.where, *filter(None, [spec.split_by])):
            self._check_column("where" if column in spec.where else "split-by", column)

    def entries(self) -> Iterator[Entry | SkippedRow]:
        """Yield one item per row that `where` keeps, in order; keys are unique.

        Raises:
            UserError: two split names map to the same folder, or there are more than `MAX_SPLITS`.
        """
        keys: dict[str, int] = {}
        self.filtered_rows = 0
        for line, row in read_rows(self.path):
            if isinstance(row, str):
                yield SkippedRow(line, "", SkipReason.BAD_ROW, row)
            elif all(
                plain(row.get(column)) in values for column, values in self.spec.where.items()
            ):
                yield self._entry(line, row, keys)
            else:
                self.filtered_rows += 1

    def values(self, column: str, at_most: int = 10) -> list[str]:
        """Return the first distinct values of a column, for error messages."""
        seen: dict[str, None] = {}
        for _, row in read_rows(self.path):
            if not isinstance(row, str) and len(seen) < at_most:
                seen[plain(row.get(column))] = None
        return list(seen)

    def _entry(self, line: int, row: Row, keys: dict[str, int]) -> Entry | SkippedRow:
        path, split = "", ""
        try:
            split = self._split(row)
            path, written, audio = self._audio(line, row)
            start, seconds = _seconds(row, self._offset), _seconds(row, self._duration)
            if audio and start is not None:
                raise _bad_row("a part of audio that the table contains")
            annotation = self._annotation(row, Path(written))
        except SkipSample as skip:
            return SkippedRow(line, path, skip.reason, skip.detail, split)
        key = _unique(safe_name(annotation.id) or "clip", keys)
        is_whole = start is None and seconds is None
        segment = None if is_whole else Segment(start or 0.0, seconds)
        return Entry(line, self.root / path, key, split, annotation, segment, audio)

    def _audio(self, line: int, row: Row) -> tuple[str, str, bytes | None]:
        """Return the path of a row's audio, its name there, and its bytes if the row has them."""
        value = row.get(self.audio)
        if isinstance(value, dict) and "file" in value:  # see `_arrow_rows`
            if value["bytes"]:
                return value["file"], value["path"] or f"row-{line}", value["bytes"]
            value = value["path"]
        if value is not None and not isinstance(value, (str, int, float)):
            raise _bad_row(f"column {self.audio!r} must be text, not {type(value).__name__}")
        path = "" if value is None else plain(value).strip()
        if not path or "\0" in path:
            raise _bad_row(f"no path in column {self.audio!r}")
        return path, path, None

    def _split(self, row: Row) -> str:
        if not self.spec.split_by:
            return ""
        value = plain(row.get(self.spec.split_by)).strip()
        split = safe_name(value)
        if not split:
            raise _bad_row(f"no name for a split in column {self.spec.split_by!r}")
        if self._splits.setdefault(split, value) != value:
            raise UserError(
                f"--split-by: {value!r} and {self._splits[split]!r} would share the folder "
                f"{split}. Rename one."
            )
        if len(self._splits) > MAX_SPLITS:
            raise UserError(
                f"--split-by {self.spec.split_by}: more than {MAX_SPLITS} values. Name a column of "
                "splits."
            )
        return split

    def _annotation(self, row: Row, written: Path) -> Annotation:
        own: dict[str, Any] = {name: row[name] for name in ANNOTATION_COLUMNS if name in row}
        own |= {name: getattr(self.spec, name) for name in CONSTANTS if getattr(self.spec, name)}
        own |= {"text": self._text(row), "label": self._label(row)}
        if not any(has_value(own.get(name)) for name in ("text", "label", "answer")):
            raise SkipSample(SkipReason.NO_TEXT, "neither text nor label nor answer")
        if not has_value(own.get("id")):
            own["id"] = written.stem
        taken = {*ANNOTATION_COLUMNS, "duration_seconds", ""}
        # Shards may be published: do not store absolute paths of the local machine in them.
        if written.is_absolute() or isinstance(row[self.audio], dict):
            taken.add(self.audio)
        if self.spec.text:  # no other column is a text, or one of several
            taken |= {"texts"} if has_value(own["text"]) else set(TEXT_FIELDS)
        extra = {name: value for name, value in row.items() if name not in taken}
        try:
            annotation = Annotation.from_mapping({**own, **extra})
            parse_row(data := annotation.to_json())
        # ValueError: a lone surrogate or an infinity. TypeError: a column of bytes or dates.
        except (SkipSample, ValueError, TypeError) as error:
            raise _bad_row(getattr(error, "detail", str(error))) from None
        if len(data) > MAX_JSON_BYTES:
            raise _bad_row(f"{len(data)} bytes of JSON, limit {MAX_JSON_BYTES}")
        return annotation

    def _column(self, option: str, given: str, usual: Sequence[str]) -> str | None:
        if given:
            return self._check_column(option, given)
        return next((column for column in usual if column in self.columns), None)

    def _text_reader(self, option: str, value: str) -> Reader:
        if "{" not in value:
            column = self._check_column(option, value)
            return lambda row: row.get(column)
        template = Template(value)
        if template.fault:
            raise UserError(
                f"--{option} {value!r}: {template.fault}. Write {{column}} or {{column:words}}."
            )
        for column in template.columns:
            self._check_column(option, column)
        return template.fill

    def _check_column(self, option: str, column: str) -> str:
        if column not in self.columns:
            hint = nearest(column, self.columns)
            raise UserError(
                f"{self.path} has no column {column!r}, which --{option} names.{hint} "
                f"Its columns: {', '.join(self.columns)}."
            )
        return column

    def _missing_column(self, option: str, usual: Sequence[str]) -> UserError:
        return UserError(
            f"{self.path} has no {option} column (looked for {', '.join(usual)}). Its columns: "
            f"{', '.join(self.columns)}. Name one with --{option} COLUMN."
        )


def _bad_row(detail: str) -> SkipSample:
    return SkipSample(SkipReason.BAD_ROW, detail)


def _seconds(row: Row, column: str | None) -> float | None:
    value = row.get(column) if column else None
    if not has_value(value):
        return None
    try:
        seconds = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise _bad_row(f"column {column!r} must be seconds, not {value!r:.40}")
    return seconds


def _unique(key: str, seen: dict[str, int]) -> str:
    candidate = key
    while candidate in seen:
        seen[key] += 1
        candidate = f"{key}-{seen[key]}"
    seen[candidate] = 1
    return candidate


def _check_table(path: Path) -> None:
    """Check that `path` is a file whose suffix is one of `TABLE_SUFFIXES`."""
    if not path.exists():
        tables = (p for p in path.parent.glob("*") if p.suffix.lower() in TABLE_SUFFIXES)
        there = sorted(table.name for table in tables)
        listed = f" There: {', '.join(there[:10])}." if there else ""
        raise UserError(
            f"There is no manifest {path.absolute()}.{nearest(path.name, there)}{listed}"
        )
    if not path.name.lower().endswith(TABLE_SUFFIXES) and not arrow_files(path):
        raise UserError(
            f"{path} is not a manifest: expected a file that ends in {', '.join(TABLE_SUFFIXES)}, "
            "or a folder of parquet or Arrow files."
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
        if path.suffix.lower() in DELIMITERS or arrow_files(path):
            break  # the first row has all columns
    if not columns:
        found = "no row that can be read" if number else "no rows"
        raise UserError(f"{path} holds {found}.{fault}")
    return tuple(columns)


def read_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Yield `(line number, row)`. For an unreadable row, yield an error message instead of the row.

    Columns without a name are dropped, such as the index that pandas writes first.

    Raises:
        UserError: the file cannot be parsed: it is not UTF-8, its header is unreadable or repeats
            a column, a quote is never closed, or it is one JSON array.
    """
    if files := arrow_files(path):
        return _arrow_rows(path, files)
    delimiter = DELIMITERS.get(path.suffix.lower())
    return _json_rows(path) if delimiter is None else _csv_rows(path, delimiter)


def read_annotations(path: str | Path) -> dict[str, Row]:
    """Read annotations by id from a JSON Lines or parquet file: objects with `id` and other fields.

    Empty fields are left out, so they replace nothing.

    Raises:
        UserError: the file cannot be read, has a row without an id or with one that occurred
            before, or sets what is stored with the shards: the licence and the duration.
    """
    path, rows = Path(path), {}
    try:
        is_arrow = path.suffix.lower() in ARROW_SUFFIXES
        numbered = enumerate(_table_rows(path), 1) if is_arrow else _json_rows(path)
        for number, row in numbered:
            where = f"{path}, row {number}"
            if isinstance(row, str):
                raise UserError(f"{where}: {row}.")
            if not (id := plain(row.pop("id", None)).strip()):
                raise UserError(f"{where} has no id: expected an object with an `id`.")
            if stored := {"licence", "license", "duration_seconds"} & row.keys():
                raise UserError(f"{where} has {stored.pop()!r}, which only the shards can state.")
            if id in rows:
                raise UserError(f"{where} has the id {id!r} of an earlier row.")
            rows[id] = {name: value for name, value in row.items() if has_value(value)}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not rows:
        raise UserError(f"{path} holds no annotations.")
    return rows


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
            row = parse_row(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        if not isinstance(row, dict):
            yield number, f"expected an object, found {type(row).__name__}"
        elif str(row.get("type")).endswith("Cut"):
            yield number, _cut_row(row)
        else:
            yield number, {name: value for name, value in row.items() if name}


def _cut_row(cut: Row) -> Row | str:
    """Return the row of a lhotse cut, or why it has none.

    The supervisions of a cut become its text, and its `segments` if there are several.
    """
    try:
        recording, begin, seconds = cut["recording"], cut["start"], cut["duration"]
        (source,) = recording["sources"]
        transforms = {one["name"] for one in recording.get("transforms") or ()} - {"Resample"}
        is_whole = source["type"] == "file" and len(source["channels"]) == 1 and not transforms
        if cut["type"] != "MonoCut" or not is_whole:
            raise ValueError
        row = {**(cut.get("custom") or {}), "id": cut["id"], "audio": source["source"]}
        if begin or seconds < recording["duration"]:
            row |= {OFFSET_COLUMN: begin, DURATION_COLUMN: seconds}
        spoken = [one for one in cut.get("supervisions") or () if one.get("text")]
        first = spoken[0] if spoken else {}
        row |= {name: first[name] for name in ("language", "speaker") if first.get(name)}
        if len(spoken) > 1:
            row["segments"] = [
                {"start": one["start"], "end": one["start"] + one["duration"], "text": one["text"]}
                for one in spoken
            ]
        return {**row, "text": " ".join(one["text"] for one in spoken)}
    except (KeyError, TypeError, ValueError):
        return f"a {cut['type']} that is not an unchanged part of a mono file: see save_audios"


def arrow_files(path: Path) -> list[Path]:
    """Return the parquet or Arrow files of a dataset, or an empty list if `path` is none."""
    inside = sorted(path.rglob("[!.]*")) if path.is_dir() else [path]
    # `datasets` caches the results of `map` next to the data.
    files = [file for file in inside if not file.name.startswith("cache-")]
    return [file for file in files if file.suffix.lower() in ARROW_SUFFIXES]


def _arrow_rows(path: Path, files: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a dataset, with the column `split`.

    A split is named by the file (`train-00000-of-00009.parquet`, perhaps with a hash at the end) or
    by its folder. Audio is `{"bytes": …, "path": …, "file": the table}`.
    """
    number = 0
    for file in files:
        named = re.match(r"(?!data-)(.+)-\d+-of-\d+(-[0-9a-f]+)?$", file.stem)
        split = named[1] if named else file.parent.name if file.parent != path else ""
        for number, row in enumerate(_table_rows(file), number + 1):  # noqa: B020
            for name, value in row.items():
                if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
                    row[name] = {**value, "file": str(file.absolute())}
            yield number, {"split": split, **row}


def _table_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a parquet or Arrow file, with names for class labels."""
    for batch in _arrow_batches(file):
        classes = _class_features(batch.schema.metadata)
        for row in batch.to_pylist():
            yield row | {
                name: _with_class_names(row[name], classes[name]) for name in classes.keys() & row
            }


def _class_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return the types of the columns that hold class labels, as `datasets` stores them."""
    try:
        features = parse_json((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: one for name, one in features.items() if '"names":' in json.dumps(one)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _with_class_names(value: Any, feature: Any) -> Any:
    """Replace class numbers by names, also in lists and structs. A negative number is no label."""
    while isinstance(feature, list) or feature.get("_type") in ("Sequence", "List", "LargeList"):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    if isinstance(value, list):
        return [_with_class_names(one, feature) for one in value]
    if isinstance(value, dict):
        return {k: _with_class_names(one, feature.get(k, {})) for k, one in value.items()}
    if "names" not in feature or not isinstance(value, int):
        return value
    names = feature["names"]
    return names[value] if 0 <= value < len(names) else None


def _arrow_batches(file: Path) -> Iterator[Any]:
    require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        if file.suffix.lower() == ".parquet":
            yield from parquet.ParquetFile(file).iter_batches(ARROW_ROWS)
        else:
            with pyarrow.memory_map(str(file)) as source:
                for batch in pyarrow.ipc.open_stream(source):
                    yield from (batch[n : n + ARROW_ROWS] for n in range(0, len(batch), ARROW_ROWS))
    except (OSError, ValueError) as error:  # ValueError: pyarrow's, for another format
        raise UserError(f"{file} cannot be read: {error}.") from None


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


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number in count(1):
            try:
                raw = file.readline(MAX_LINE_BYTES + 1)
            except (EOFError, zlib.error) as error:
                raise UserError(f"{path} is damaged: {error}.") from None
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise UserError(f"Line {number} of {path} has more than {MAX_LINE_BYTES} bytes.")
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                guess = "UTF-16" if raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "LATIN1"
                raise UserError(
                    f"Line {number} of {path} is not UTF-8 (byte 0x{raw[error.start]:02x}). "
                    f"Convert it, for instance from {guess}: "
                    f"iconv -f {guess} -t UTF-8 {path.name} > utf8{path.suffix}"
                ) from None
