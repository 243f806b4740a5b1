"""Leave samples out of a run: those an audit lists, and those whose licence is not allowed.

Licences are matched as whole strings and mapped to SPDX ids (https://spdx.org/licenses). The ids
in `SPDX_IDS`, the URLs and official titles of Creative Commons and Open Data Commons, and common
abbreviations are known. Any other licence is unknown, and no allow-list admits it. This is not
legal advice: it only compares what the corpora state.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from whisper_aut.data.annotation import read_lines, safe_name
from whisper_aut.data.reader import DEFAULT_POLICY, ReadPolicy, is_local, open_stream
from whisper_aut.data.shards import FolderCounts, SampleTable, Selection, ShardIndex, text_hash
from whisper_aut.data.writer import build_table
from whisper_aut.errors import SkipReason, UserError
from whisper_aut.utils import parse_json

SPDX_IDS = (
    "0BSD", "AGPL-3.0-only", "AGPL-3.0-or-later", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause",
    "BSD-3-Clause", "BSL-1.0", "C-UDA-1.0", "CC-PDDC", "CC-PDM-1.0", "CC0-1.0",
    "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "CDLA-Sharing-1.0", "DL-DE-BY-2.0",
    "DL-DE-ZERO-2.0", "EUPL-1.2", "GFDL-1.2-only", "GFDL-1.2-or-later", "GFDL-1.3-only",
    "GFDL-1.3-or-later", "GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later",
    "ISC", "LAL-1.2", "LAL-1.3", "LGPL-2.1-only", "LGPL-2.1-or-later", "LGPL-3.0-only",
    "LGPL-3.0-or-later", "MIT", "MIT-0", "MPL-2.0", "O-UDA-1.0", "ODC-By-1.0", "ODbL-1.0",
    "OGL-Canada-2.0", "OGL-UK-1.0", "OGL-UK-2.0", "OGL-UK-3.0", "PDDL-1.0", "Unlicense",
    "WTFPL", "etalab-2.0",
)  # fmt: skip
# Other spellings: lower case, without a leading "the" and a trailing "license".
TITLES = {
    "CC0-1.0": (
        "cc0", "cc-0", "cc zero", "cc0 1.0", "cc0 1.0 universal", "creative commons 0",
        "creative commons 0 1.0", "creative commons cc0", "creative commons zero",
        "creative commons zero v1.0 universal", "cc0 1.0 universal public domain dedication",
        "creative commons cc0 1.0 universal", "creative commons zero 1.0 universal",
        "creative commons cc0 1.0 universal public domain dedication",
    ),
    "CC-PDM-1.0": ("public domain mark 1.0", "public domain mark 1.0 universal"),
    "ODbL-1.0": (
        "odbl", "odbl 1.0", "odbl v1.0", "open database license", "open database license 1.0",
        "open database license v1.0", "open data commons open database license",
        "open data commons open database license 1.0",
        "open data commons open database license v1.0",
    ),
    "ODC-By-1.0": (
        "odc-by", "odc by 1.0", "open data commons attribution",
        "open data commons attribution license 1.0", "open data commons attribution license v1.0",
    ),
    "PDDL-1.0": (
        "pddl", "open data commons public domain dedication & license",
        "open data commons public domain dedication & license 1.0",
    ),
    "MIT": ("mit/expat", "expat"),
    "Apache-2.0": ("apache 2.0", "apache license 2.0", "apache license version 2.0", "apache 2"),
    "BSD-2-Clause": ('bsd 2-clause "simplified"', "bsd 2-clause"),
    "BSD-3-Clause": ('bsd 3-clause "new" or "revised"', "bsd 3-clause"),
    "GPL-3.0-only": ("gnu general public license v3.0 only",),
    "GPL-3.0-or-later": ("gnu general public license v3.0 or later",),
    "LAL-1.3": ("free art license 1.3", "free art 1.3"),
    "OGL-UK-3.0": ("open government licence v3.0", "open government licence 3.0"),
    "CDLA-Permissive-2.0": ("community data license agreement permissive 2.0",),
    "C-UDA-1.0": ("computational use of data agreement v1.0",),
}  # fmt: skip
URLS = {
    "creativecommons.org/publicdomain/zero/1.0": "CC0-1.0",
    "creativecommons.org/publicdomain/mark/1.0": "CC-PDM-1.0",
    "creativecommons.org/licenses/publicdomain": "CC-PDDC",
    "opendatacommons.org/licenses/odbl/1-0": "ODbL-1.0",
    "opendatacommons.org/licenses/odbl/1.0": "ODbL-1.0",
    "opendatacommons.org/licenses/by/1-0": "ODC-By-1.0",
    "opendatacommons.org/licenses/by/1.0": "ODC-By-1.0",
    "opendatacommons.org/licenses/pddl/1-0": "PDDL-1.0",
    "opendatacommons.org/licenses/pddl/1.0": "PDDL-1.0",
    "opensource.org/licenses/mit": "MIT",
    "opensource.org/license/mit": "MIT",
    "apache.org/licenses/license-2.0": "Apache-2.0",
    "artlibre.org/licence/lal/en": "LAL-1.3",
    "artlibre.org/licence/lal": "LAL-1.3",
}
# Jurisdictions to which Creative Commons ported its licences. A port counts as its version.
PORTS = {
    "ar": "argentina", "am": "armenia", "au": "australia", "at": "austria", "az": "azerbaijan",
    "be": "belgium", "br": "brazil", "bg": "bulgaria", "ca": "canada", "cl": "chile",
    "cn": "china mainland", "co": "colombia", "cr": "costa rica", "hr": "croatia",
    "cz": "czech republic", "dk": "denmark", "ec": "ecuador", "eg": "egypt", "ee": "estonia",
    "fi": "finland", "fr": "france", "ge": "georgia", "de": "germany", "gr": "greece",
    "gt": "guatemala", "hk": "hong kong", "hu": "hungary", "igo": "igo", "in": "india",
    "ie": "ireland", "il": "israel", "it": "italy", "jp": "japan", "kr": "korea",
    "lu": "luxembourg", "mk": "macedonia", "my": "malaysia", "mt": "malta", "mx": "mexico",
    "nl": "netherlands", "nz": "new zealand", "no": "norway", "pe": "peru", "ph": "philippines",
    "pl": "poland", "pt": "portugal", "pr": "puerto rico", "ro": "romania", "rs": "serbia",
    "scotland": "uk: scotland", "sg": "singapore", "si": "slovenia", "za": "south africa",
    "es": "spain", "se": "sweden", "ch": "switzerland", "tw": "taiwan", "th": "thailand",
    "ug": "uganda", "uk": "uk: england & wales", "us": "united states", "ve": "venezuela",
    "vn": "vietnam",
}  # fmt: skip

_VERSION = r"(?P<version>1\.0|2\.0|2\.1|2\.5|3\.0|4\.0)"
_TERMS = r"by(?:[-_ ]?(?P<nc>nc))?(?:[-_ ]?(?:(?P<sa>sa)|(?P<nd>nd)))?"
_CODES = "|".join(PORTS)
_NAMES = "|".join(re.escape(name) for name in PORTS.values())
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
_KNOWN = {name.lower(): name for name in SPDX_IDS} | {
    title: name for name, titles in TITLES.items() for title in titles
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
        if text in URLS:
            return URLS[text]
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

    Raises:
        UserError: an entry of `allowed` is unknown.
    """
    found = licence_id(written)
    entries = [parse_allowed_licence(entry) for entry in allowed]
    return not entries or any(
        found and (found == entry or re.fullmatch(re.escape(entry) + r"-\d\.\d", found))
        for entry in entries
    )


def parse_allowed_licence(entry: str) -> str:
    """Return the SPDX id of an entry of an allow-list.

    Raises:
        UserError: the licence is unknown, so the entry would admit nothing.
    """
    found = licence_id(entry)
    if not found:
        raise UserError(
            f"{entry!r} is not a known licence. Give SPDX ids (CC-BY-4.0, CC0-1.0, MIT), CC-BY for "
            "all its versions, or LicenseRef-NAME for your own licence."
        )
    return found


READERS = 16
ShardKey = tuple[str, str]  # name of the shard, key of the sample


class Exclusions:
    """Samples to exclude: fingerprint of the folder, name of the shard, and key, from an audit."""

    def __init__(self, samples: Iterable[tuple[str, str, str]] = ()):
        self._samples: dict[str, set[ShardKey]] = defaultdict(set)
        for fingerprint, shard, key in samples:
            self._samples[fingerprint].add((shard, key))

    @classmethod
    def load(cls, path: str | Path) -> "Exclusions":
        """Read a list of exclusions: one JSON object with fingerprint, shard and key per line.

        Raises:
            UserError: the file cannot be read, or a line lacks one of these fields.
        """
        command = "whisper-aut data audit TRAIN --against PROBE"
        try:
            lines = read_lines(Path(path))
        except OSError as error:
            raise UserError(
                f"data.exclude: cannot read {path} ({error.strerror}). Write one: {command}"
            ) from None
        samples = []
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json(line)
                samples.append((str(entry["fingerprint"]), str(entry["shard"]), str(entry["key"])))
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"Line {number} of {path} is not an object with fingerprint, shard and key: "
                    f"{line[:80]!r}. Write the list again: {command}"
                ) from None
        return cls(samples)

    def for_index(self, index: ShardIndex) -> frozenset[ShardKey]:
        """Return `(shard, key)` of each excluded sample of a folder."""
        return frozenset().union(*(self._samples[one] for one in index.identities()))

    def __len__(self) -> int:
        return sum(map(len, self._samples.values()))


def select_samples(
    index: ShardIndex,
    excluded: Collection[ShardKey] = (),
    allowed: Sequence[str] = (),
    licence: str = "",
    policy: ReadPolicy = DEFAULT_POLICY,
) -> ShardIndex:
    """Return an index that selects all samples but the excluded and those with other licences.

    This uses the sample tables. If a local folder has none, its tars are read, without the audio.

    Args:
        index: the shards.
        excluded: `(shard, key)` of each sample to exclude.
        allowed: allowed licences, see `licence_allowed`; empty for all.
        licence: the licence of samples that state none.
        policy: how to retry.

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

    def choose(number: int) -> tuple[np.ndarray, Counter[str], list[tuple[str, int, float]]]:
        table, licences = _table(index, number, policy)
        names = {text_hash(name): name for name in licences}
        admitted = [id for id, name in names.items() if licence_allowed(allowed, name or licence)]
        listed = np.isin(table.keys, excluded_keys.get(index.shards[number].name, []))
        barred = ~np.isin(table.licences, admitted) & ~listed & bool(allowed)
        rows = np.flatnonzero(~listed & ~barred).astype(np.uint32)
        left_out = Counter({str(SkipReason.EXCLUDED): int(listed.sum())})
        left_out[str(SkipReason.LICENCE)] = int(barred.sum())
        counts = [
            (names.get(id, "unknown"), clips, seconds)
            for id, clips, seconds in table.count_licences(rows)
        ]
        return rows, left_out, counts

    try:
        # In parallel, because object stores have a high latency.
        with ThreadPoolExecutor(READERS) as pool:
            chosen = list(pool.map(choose, range(len(index.shards))))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The sample tables of {index.root} cannot be read ({error}), which data.exclude and "
            f"data.licences.allow need. Write them again: whisper-aut data index {index.root}"
        ) from None
    kept = FolderCounts()
    for name, clips, seconds in (count for *_, counts in chosen for count in counts):
        kept.add("", name, seconds, clips)
    selection = Selection(
        ordinals=tuple(rows for rows, *_ in chosen),
        seconds=sum(counts["seconds"] for counts in kept.licences.values()),
        licences=kept.metadata()["licences"],
        left_out=dict(sum((left_out for _, left_out, _ in chosen), Counter())),
    )
    return replace(index, selection=selection)


def unmatched_ids(
    index: ShardIndex, ids: Collection[str], policy: ReadPolicy = DEFAULT_POLICY
) -> list[str]:
    """Return the ids that are no key of a sample, as they are or as `data build` makes keys of ids.

    Raises:
        UserError: the sample tables cannot be read.
    """
    if not ids:
        return []
    try:
        with ThreadPoolExecutor(READERS) as pool:
            tables = pool.map(lambda n: _table(index, n, policy)[0], range(len(index.shards)))
            keys = np.unique(np.concatenate([table.keys for table in tables]))
    except (OSError, ValueError) as error:
        raise UserError(f"The sample tables of {index.root} cannot be read: {error}.") from None
    known = set(keys.tolist())
    return [id for id in ids if not {text_hash(id), text_hash(safe_name(id))} & known]


def _table(
    index: ShardIndex, number: int, policy: ReadPolicy
) -> tuple[SampleTable, Collection[str]]:
    """Return a shard's table, read or computed, and the licences, as written, it may refer to."""
    if index.has_tables:
        return index.table(number, policy), index.licences
    if not index.shards[number].samples:  # the tar is damaged before its first sample
        return SampleTable.from_rows((), 0), ()
    counts = FolderCounts()
    with open_stream(index.url(number)) as stream:
        return build_table(stream, counts, audio=False), counts.licences
