"""Map the language tags that corpora use to Whisper's language codes and names.

`de`, `deu`, `ger`, `de-AT`, `deu_Latn`, `de_DE.UTF-8` and `German` all mean German. The tables are
ISO 639-3 with names, macrolanguages and retired codes (https://iso639-3.sil.org, via
`python-iso639`), and Whisper's own codes and synonyms.
"""

import re
from collections.abc import Iterator
from functools import cache, lru_cache

from iso639 import Language, LanguageNotFoundError

# Two-letter codes withdrawn from ISO 639-1. The tables only have retired three-letter codes.
WITHDRAWN = {"in": "id", "iw": "he", "ji": "yi", "jw": "jv", "mo": "ro"}
# Where Whisper deviates from ISO 639: it writes `jw` for Javanese, and its Tagalog was trained and
# tested on Filipino.
WHISPERS_OWN = {"jv": "jw", "fil": "tl"}
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
    said = tag.strip().lower()
    names, synonyms = _whisper_names()
    own = [synonyms.get(name, name) for name in (said, _without_brackets(said))]
    closest = [code for code in own if code in names]
    language = _language(closest[0] if closest else said)
    others = [code for code in _codes(language) if code in names] if language else []
    return tuple(dict.fromkeys([*closest, *others]))


@lru_cache(maxsize=4096)
def language_name(tag: str) -> str:
    """Return the English name of a language, or an empty string if the tag is unknown.

    Whisper's name is preferred to that of ISO 639.

    Args:
        tag: see `whisper_codes`.

    Examples:
        >>> [language_name(tag) for tag in ("et", "fra", "zh-yue", "ceb", "Klingon", "xq")]
        ['Estonian', 'French', 'Cantonese', 'Cebuano', 'Klingon', '']
    """
    if codes := whisper_codes(tag):
        return _whisper_names()[0][codes[0]].title()
    language = _language(tag.strip().lower())
    if language is None or language.type == "S":  # ISO 639's special codes, such as `und`, `mul`
        return ""
    return _without_brackets(language.name)


def _language(said: str) -> Language | None:
    """Look up a lower-case code, name or tag in the tables of ISO 639."""
    tag = TAG.fullmatch(said)
    if tag and (tag["language"] == said or (found := _find(said)) is None):
        found = _find(WITHDRAWN.get(tag["language"], tag["language"]))
        extended = _find(tag["extended"] or "")
        # `zh-yue` is Cantonese. In `eng-USA`, the three letters are a country.
        if found and extended and extended.macrolanguage == found.part3:
            return extended
        return found
    return _find(said) or _find(_without_brackets(said))


def _find(said: str) -> Language | None:
    try:
        return Language.match(said, strict_case=False) if said else None
    except LanguageNotFoundError:
        return None


def _codes(language: Language) -> Iterator[str]:
    for code in (language.part1, language.part3):
        if code:
            yield WHISPERS_OWN.get(code, code)
    for wider in (language.retire_change_to, language.macrolanguage):
        if wider:
            yield from _codes(Language.from_part3(wider))


def _without_brackets(name: str) -> str:
    """Remove text in brackets: `Waray (Philippines)` becomes `Waray`."""
    return re.sub(r"\s*\(.*\)", "", name).strip()


@cache
def _whisper_names() -> tuple[dict[str, str], dict[str, str]]:
    """Return Whisper's tables: code to name, and name or synonym to code."""
    # Imported here because it is slow and many commands do not need it.
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    return LANGUAGES, TO_LANGUAGE_CODE | COLLOQUIAL
