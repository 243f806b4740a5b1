"""Leave samples out of a run: those an audit lists, and those whose licence is not allowed.

Licences are matched as whole strings and mapped to SPDX ids (https://spdx.org/licenses). The ids,
URLs, official titles and common abbreviations in `licences.yaml` are known. Any other licence is
unknown, and no allow-list admits it. This is not legal advice: it only compares what the corpora
state.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml

from whisper_aut.data.annotation import read_lines, safe_name
from whisper_aut.data.reader import is_local, open_stream
from whisper_aut.data.shards import FolderCounts, SampleTable, Selection, ShardIndex, text_hash
from whisper_aut.data.writer import build_table
from whisper_aut.errors import SkipReason, UserError
from whisper_aut.utils import parse_json

_TABLES = yaml.safe_load(Path(__file__).with_name("licences.yaml").read_text(encoding="utf-8"))
_VERSION = r"(?P<version>1\.0|2\.0|2\.1|2\.5|3\.0|4\.0)"
_TERMS = r"by(?:[-_ ]?(?P<nc>nc))?(?:[-_ ]?(?:(?P<sa>sa)|(?P<nd>nd)))?"
_CODES = "|".join(_TABLES["ports"])
_NAMES = "|".join(re.escape(name) for name in _TABLES["ports"].values())
_CREATIVE_COMMONS = tuple(
    map(
        re.compile,
        (
            # CC-BY-NC-4.0, CC BY 3.0 US, creative commons by-sa 4.0
            rf"(?:cc|creative commons(?: cc)?)[-_ ]?{_TERMS}"
            rf"(?:[-_ ]?v?{_VERSION}(?:[-_ ](?:{_CODES}|international|unported|generic))?)?",
            # Attribution-NonCommercial-ShareAlike 4.0 International
            r"(?:creative commons )?attribution(?:[- ](?P<nc>non[- ]?commercial))?"
            r"(?:[- ](?:(?P<sa>share[- ]?alike)|(?P<nd>no[- ]?deriv(?:ative)?s(?:[- ]works)?|"
            r"no[- ]?derivative works)))?(?: aka music sharing)?"
            rf"(?: v?{_VERSION}(?: (?:international|unported|generic|{_NAMES}))?)?",
            rf"creativecommons\.org/licenses/{_TERMS}(?:/{_VERSION}(?:/(?:{_CODES}))?)?",
        ),
    )
)
_KNOWN = {name.lower(): name for name in _TABLES["ids"]} | {
    title: name for name, titles in _TABLES["titles"].items() for title in titles
}
_OWN = re.compile(r"licenseref-[a-z0-9.-]+")


@lru_cache(maxsize=4096)
def licence_id(written: str) -> str:
    """Return the SPDX id of a licence as a corpus writes it, or `""` if it is unknown.

    The id has no version if none is stated. Custom licences are written `LicenseRef-NAME`, as in
    SPDX.
    """
    text = re.sub(r"[‐‑‒–—−]", "-", unicodedata.normalize("NFKC", written))
    text = " ".join(text.lower().replace(",", " ").split())
    text = text.replace("(aka music sharing)", "aka music sharing")
    # A title with its short form in brackets: both must agree.
    if brackets := re.fullmatch(r"(.+?) ?\((.+?)\)(.*)", text):
        title = licence_id(brackets[1] + brackets[3])
        return title if title == licence_id(brackets[2]) else ""
    if _OWN.fullmatch(text):
        return written.strip()
    if address := re.fullmatch(r"(?:https?://)?(?:www\.)?([a-z]+\.org/.+)", text):
        text = re.sub(r"/?(?:(?:deed|legalcode)(?:[.-][a-z_-]+)?|\.html|\.txt)$", "", address[1])
        text = text.rstrip("/")
        if text in _TABLES["urls"]:
            return _TABLES["urls"][text]
    text = re.sub(r" (?:public )?licen[cs]e$| deed$", "", text.removeprefix("the "))
    text = text.replace(" and ", " & ")
    if text in _KNOWN:
        return _KNOWN[text]
    for pattern in _CREATIVE_COMMONS:
        if found := pattern.fullmatch(text):
            terms = [name.upper() for name in ("nc", "sa", "nd") if found[name]]
            return "-".join(["CC", "BY", *terms, *filter(None, [found["version"]])])
    return ""


def licence_allowed(allowed: Sequence[str], written: str) -> bool:
    """Return whether an allow-list admits a licence, as a corpus writes it.

    An entry without a version admits every version, an empty list every licence.
    """
    found = licence_id(written)
    entries = [licence_id(entry) for entry in allowed]
    return not entries or any(
        found and (found == entry or re.fullmatch(re.escape(entry) + r"-\d\.\d", found))
        for entry in entries
    )


def check_allowed_licence(entry: str) -> str:
    """Return an entry of an allow-list.

    Raises:
        ValueError: the licence is unknown, so the entry would admit nothing.
    """
    if not licence_id(entry):
        raise ValueError(
            f"{entry!r} is not a known licence. Give SPDX ids (CC-BY-4.0, CC0-1.0, MIT), CC-BY for "
            "all its versions, or LicenseRef-NAME for your own licence."
        )
    return entry


READERS = 16
Result = TypeVar("Result")
ShardKey = tuple[str, str]  # name of the shard, key of the sample


def read_exclusions(path: str | Path) -> dict[str, set[ShardKey]]:
    """Read the list that an audit wrote: the excluded samples by fingerprint of their folder.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object with fingerprint, shard
            and key.
    """
    command = "whisper-aut data audit TRAIN --against PROBE"
    try:
        lines = read_lines(Path(path))
    except OSError as error:
        raise UserError(
            f"data.exclude: cannot read {path} ({error.strerror}). Write one: {command}"
        ) from None
    samples: dict[str, set[ShardKey]] = defaultdict(set)
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            samples[str(entry["fingerprint"])].add((str(entry["shard"]), str(entry["key"])))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"Line {number} of {path} is not an object with fingerprint, shard and key: "
                f"{line[:80]!r}. Write the list again: {command}"
            ) from None
    return samples


def excluded_from(index: ShardIndex, exclusions: Mapping[str, set[ShardKey]]) -> set[ShardKey]:
    """Return `(shard, key)` of each sample of a folder that `read_exclusions` lists."""
    return set().union(*(exclusions.get(one, ()) for one in index.identities()))


def select_samples(
    index: ShardIndex,
    excluded: Collection[ShardKey] = (),
    allowed: Sequence[str] = (),
    licence: str = "",
) -> ShardIndex:
    """Return an index that selects all samples but the excluded and those with other licences.

    This uses the sample tables. If a local folder has none, its tars are read, without the audio.

    Args:
        index: the shards.
        excluded: `(shard, key)` of each sample to exclude.
        allowed: allowed licences, see `licence_allowed`; empty for all.
        licence: the licence of samples that state none.

    Raises:
        UserError: the tables cannot be read, or the folder is remote and has none.
    """
    stated = index.licences if index.has_tables else ()
    if not excluded and (
        not allowed
        or (stated and all(licence_allowed(allowed, name or licence) for name in stated))
    ):
        return index
    if not index.has_tables and not is_local(index.root):
        raise UserError(
            f"{index.root} has no sample tables, which data.exclude and data.licences.allow need. "
            "Write them where the tars are on a disk: whisper-aut data index FOLDER"
        )
    excluded_keys: dict[str, list[int]] = defaultdict(list)
    for shard, key in excluded:
        excluded_keys[shard].append(text_hash(key))

    def choose(
        number: int, table: SampleTable, licences: Collection[str]
    ) -> tuple[np.ndarray, Counter[str], FolderCounts]:
        names = {text_hash(name): name for name in licences}
        admitted = [id for id, name in names.items() if licence_allowed(allowed, name or licence)]
        listed = np.isin(table.keys, excluded_keys.get(index.shards[number].name, []))
        barred = ~np.isin(table.licences, admitted) & ~listed & bool(allowed)
        rows = np.flatnonzero(~listed & ~barred).astype(np.uint32)
        left_out = {SkipReason.EXCLUDED: int(listed.sum()), SkipReason.LICENCE: int(barred.sum())}
        counts = FolderCounts()
        counts.add_table(table, licences, rows)
        return rows, Counter({str(reason): n for reason, n in left_out.items()}), counts

    chosen = _map_tables(index, choose)
    kept = FolderCounts()
    for *_, counts in chosen:
        kept.update(counts)
    selection = Selection(
        ordinals=tuple(rows for rows, *_ in chosen),
        seconds=sum(counts["seconds"] for counts in kept.licences.values()),
        licences=kept.metadata()["licences"],
        left_out=dict(sum((left_out for _, left_out, _ in chosen), Counter())),
    )
    return replace(index, selection=selection)


def unmatched_ids(index: ShardIndex, ids: Collection[str]) -> list[str]:
    """Return the ids that are no key of a sample, as they are or as `data build` makes keys of ids.

    Raises:
        UserError: the sample tables cannot be read.
    """
    if not ids:
        return []
    tables = _map_tables(index, lambda number, table, licences: table.keys)
    keys = np.unique(np.concatenate(tables))
    known = set(keys.tolist())
    return [id for id in ids if not {text_hash(id), text_hash(safe_name(id))} & known]


def _map_tables(
    index: ShardIndex, function: Callable[[int, SampleTable, Collection[str]], Result]
) -> list[Result]:
    """Return `function(number, table, licences)` of each shard.

    The table is read, or else computed; `licences` are those, as written, that it may refer to.
    """

    def apply(number: int) -> Result:
        if index.has_tables:
            return function(number, index.table(number), index.licences)
        if not index.shards[number].samples:  # the tar is damaged before its first sample
            return function(number, SampleTable.from_rows((), 0), ())
        counts = FolderCounts()
        with open_stream(index.url(number)) as stream:
            table = build_table(stream, counts, audio=False)
        return function(number, table, counts.licences)

    try:
        # In parallel, because object stores have a high latency.
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(apply, range(len(index.shards))))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The sample tables of {index.root} cannot be read ({error}), which data.exclude, "
            "data.licences.allow and annotations need. Write them again: whisper-aut data index "
            f"{index.root}"
        ) from None
