"""Read tables of clips: CSV, TSV and JSON Lines files."""

import csv
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path

from whisper_aut.data.annotation import MAX_JSON_BYTES, Row, parse_json
from whisper_aut.errors import UserError, nearest

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl", ".json")


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
