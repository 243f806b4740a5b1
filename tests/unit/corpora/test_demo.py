import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import soundfile

from whisper_aut.corpora.synth import corpus as demo
from whisper_aut.corpora.synth.corpus import (
    LABELS,
    LICENCE,
    SPLITS,
    ClipSpec,
    build_demo,
    count_clips,
)
from whisper_aut.data.annotation import DOMAINS, Annotation
from whisper_aut.data.shards import INDEX_NAME, open_index
from whisper_aut.errors import UserError

pytest.importorskip("espeakng_loader", reason="the demo corpus needs the extra `demo`")

TINY: dict[str, Any] = {"seed": 3, "scale": 0.0027, "workers": 1, "progress": False}
ONE_EACH = {**TINY, "scale": 1e-6}
FOLDERS = [f"{split}/{domain}" for split in SPLITS for domain in DOMAINS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("demo"), **TINY)


def checksums(root: Path) -> dict[str, list[str]]:
    return {
        folder: [shard.sha256 for shard in open_index(root / folder).shards] for folder in FOLDERS
    }


def samples(folder: Path) -> list[tuple[bytes, Annotation]]:
    with tarfile.open(folder / "shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted({name.split(".")[0] for name in members})
    return [(members[f"{key}.flac"], Annotation.from_json(members[f"{key}.json"])) for key in keys]


def failing_after(clips: int, error: type[BaseException]):
    """Return a renderer that raises `error` (as Ctrl-C or a bug would) after some clips."""
    done = []

    def render(order: ClipSpec):
        if len(done) == clips:
            raise error
        done.append(order)
        return demo_render(order)

    demo_render = demo.render_clip
    return render


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_split_and_domain_has_the_requested_clips(corpus: Path, folder: str):
    split, domain = folder.split("/")
    clips = samples(corpus / folder)
    assert (
        len(clips)
        == open_index(corpus / folder).samples
        == count_clips(split, domain, TINY["scale"])
    )
    for flac, annotation in clips:
        audio = soundfile.info(io.BytesIO(flac))
        assert (audio.samplerate, audio.channels) == (16_000, 1)
        assert 1 <= audio.duration <= 12
        assert annotation.duration_seconds == pytest.approx(audio.duration, abs=1e-3)
        assert (annotation.domain, annotation.source, annotation.licence) == (
            domain,
            "demo",
            LICENCE,
        )
        assert annotation.task == ("asr" if domain == "speech" else "caption")
        assert annotation.id.startswith(f"{split}-{domain}-")
        assert annotation.text
        assert annotation.label in LABELS[domain] or (
            domain == "speech" and annotation.label is None
        )


def test_shards_are_the_same_bytes_whatever_the_workers(corpus: Path, tmp_path: Path):
    build_demo(tmp_path, **{**TINY, "workers": 2})
    assert checksums(tmp_path) == checksums(corpus)


def test_another_seed_gives_other_clips_and_splits_share_none(corpus: Path, tmp_path: Path):
    build_demo(tmp_path, **{**ONE_EACH, "seed": 4})
    flacs = [
        flac
        for root in (corpus, tmp_path)
        for folder in FOLDERS
        for flac, _ in samples(root / folder)
    ]
    assert len(set(flacs)) == len(flacs)


def test_an_existing_corpus_is_not_rendered_again(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "render_clip", failing_after(0, AssertionError))
    assert build_demo(corpus, **TINY) == corpus


def test_a_missing_shard_or_other_options_build_it_again(tmp_path: Path):
    before = checksums(build_demo(tmp_path, **ONE_EACH))
    (tmp_path / "valid/music/shard-000000.tar").unlink()
    assert checksums(build_demo(tmp_path, **ONE_EACH)) == before
    build_demo(tmp_path, **{**ONE_EACH, "seed": 1})
    assert not any(checksums(tmp_path)[folder] == before[folder] for folder in FOLDERS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_the_folder_as_it_was(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    monkeypatch.setattr(demo, "render_clip", failing_after(12, error))
    with pytest.raises(error):
        build_demo(tmp_path, **TINY)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    before = checksums(corpus)
    with pytest.raises(error):
        build_demo(corpus, **{**TINY, "seed": 9})
    assert checksums(corpus) == before
    assert not list(corpus.rglob(".*"))


@pytest.mark.parametrize("index", [None, "{}", "[]", "not json", '{"builder": "another"}'])
def test_shards_of_another_builder_are_not_overwritten(tmp_path: Path, index: str | None):
    folder = tmp_path / "train/sound"
    folder.mkdir(parents=True)
    (folder / "shard-000000.tar").write_bytes(b"mine")
    if index is not None:
        (folder / INDEX_NAME).write_text(index)
    with pytest.raises(UserError, match="not part of the demo corpus"):
        build_demo(tmp_path, **TINY)
    assert (folder / "shard-000000.tar").read_bytes() == b"mine"


def test_without_the_extra_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"whisper-aut\[demo\]"):
        build_demo(tmp_path, **TINY)


@pytest.mark.parametrize(("split", "least"), [("train", 40), ("test", 14)])
def test_the_default_size_is_large_enough_for_probes(split: str, least: int):
    assert count_clips(split, "speech") // 2 // len(LABELS["speech"]) >= least
    assert count_clips(split, "sound") // len(LABELS["sound"]) >= least
    assert count_clips(split, "music") // len(LABELS["music"]) >= least
