"""What a clip's own words say of where it comes from: names under which the same recording may appear elsewhere.

In: a clip's key and `Annotation`. Out: comparable names such as `freesound:100032`. Next: `corpora.audit` looks for those that two
corpora share. A number alone is no name: `0001.wav` is in every corpus.
"""

import re

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.audio import AUDIO_SUFFIXES

FREESOUND_FIELDS = ("freesound_id", "fsid", "fsID", "fs_id")
YOUTUBE_FIELDS = ("youtube_id", "ytid")
FREESOUND_SOURCES = re.compile(r"freesound|fsd50k|fsd18|fsdkaggle", re.I)
YOUTUBE_SOURCES = re.compile(r"audioset|audiocaps|musiccaps|musicbench|vggsound", re.I)
ESC_NAME = re.compile(r"[1-5]-(\d+)-[A-Z]-\d+")  # fold, Freesound id, take, class
URBANSOUND_NAME = re.compile(r"(\d+)-\d+-\d+-\d+")  # Freesound id, class, occurrence, slice
YOUTUBE_NAME = re.compile(r"Y?([\w-]{11})(?:_\d+)*")
GENERIC_NAME = re.compile(r"[a-z]*_?\d+|\D*")  # clip_0012, or no number at all
MIN_NAME_CHARACTERS = 8
_SUFFIX = re.compile(rf"\.({'|'.join(AUDIO_SUFFIXES)})$", re.I)


def names_of(key: str, annotation: Annotation) -> frozenset[str]:
    """Return the names of one clip: `file:NAME`, `SOURCE:ID`, `freesound:ID`, `youtube:ID`."""
    names: set[str] = set()
    for written in {key, annotation.id} - {""}:
        name = _SUFFIX.sub("", written.rpartition("/")[2])
        if annotation.source:
            names.add(f"{_plain(annotation.source)}:{_plain(name)}")
        if len(name) >= MIN_NAME_CHARACTERS and not GENERIC_NAME.fullmatch(_plain(name)):
            names.add(f"file:{_plain(name)}")
        names |= _origins(name, annotation.source)
    for site, fields in (("freesound", FREESOUND_FIELDS), ("youtube", YOUTUBE_FIELDS)):
        names |= {
            f"{site}:{annotation.extra[field]}"
            for field in fields
            if annotation.extra.get(field) not in (None, "")
        }
    return frozenset(names)


def _origins(name: str, source: str) -> set[str]:
    if found := ESC_NAME.fullmatch(name):
        return {f"freesound:{found[1]}"}
    if "urbansound" in source.lower() and (found := URBANSOUND_NAME.fullmatch(name)):
        return {f"freesound:{found[1]}"}
    if FREESOUND_SOURCES.search(source) and name.isdecimal():
        return {f"freesound:{name}"}
    if YOUTUBE_SOURCES.search(source) and (found := YOUTUBE_NAME.fullmatch(name)):
        return {f"youtube:{found[1]}"}
    return set()


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
