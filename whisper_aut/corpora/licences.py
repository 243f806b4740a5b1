"""The many ways in which corpora write a licence → one id, and whether it is among those that are allowed.

In: a licence as written (`CC BY 4.0`, `https://creativecommons.org/licenses/by/4.0/`, `Attribution NonCommercial`). Out: an SPDX id
(https://spdx.org/licenses) where the writing is known, else the writing itself. Next: `corpora.exclusion` filters by it, `training.train`
lists it. Nothing here is legal advice: what is compared is what a corpus says of itself.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

_VERSION = re.compile(r"(\d)(?:\.(\d))?")
_PARTS = (
    ("NC", r"\bnc\b|non-?commercial"),
    ("SA", r"\bsa\b|share-?alike"),
    ("ND", r"\bnd\b|no-?deriv\w*"),
)
_PLAIN = {"mit": "MIT", "apache 2.0": "Apache-2.0", "apache-2.0": "Apache-2.0", "cc0": "CC0-1.0"}
_SAMPLING = re.compile(r"sampling")


@lru_cache(maxsize=4096)
def licence_id(written: str) -> str:
    """Return the SPDX id of a licence as written; without a version where none is stated, `""` for nothing."""
    text = re.sub(r"[\s_/]+", " ", written.strip().lower())
    if text in _PLAIN:
        return _PLAIN[text]
    if re.search(r"publicdomain zero|\bcc-?0\b|\bcc zero\b|creative commons 0", text):
        return "CC0-1.0"
    if _SAMPLING.search(text) or not re.search(r"\bby\b|attribution", text):
        return written.strip()
    parts = ["CC", "BY", *(name for name, pattern in _PARTS if re.search(pattern, text))]
    version = _VERSION.search(text)
    return "-".join(parts) + (f"-{version[1]}.{version[2] or 0}" if version else "")


def allows(allowed: Sequence[str], written: str) -> bool:
    """Return whether a licence is one of `allowed`; one of these without a version stands for every version, an empty list for all."""
    if not allowed:
        return True
    own = licence_id(written)
    return any(
        own == wanted or re.fullmatch(re.escape(wanted) + r"-\d\.\d", own)
        for wanted in map(licence_id, allowed)
    )
