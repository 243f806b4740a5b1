"""Clips that are longer than the limit, and clips with several texts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.audio import encode_audio
from whisper_aut.audio.augment import Augment, AugmentSettings
from whisper_aut.audio.decode import ClipLimits, LongClips
from whisper_aut.audio.logmel import LogMel
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.batch import Example, collate
from whisper_aut.data.dataset import ExampleBuilder
from whisper_aut.data.reader import Sample, SkippedSample
from whisper_aut.data.targets import WhisperText
from whisper_aut.errors import SkipReason, SkipSample
from whisper_aut.models.pretrained import PretrainedWhisper

CAPTION = Annotation("a long tune", task="caption", id="tune")
TRANSCRIPT = Annotation("many words", task="asr", id="talk")
SEGMENTS = [{"start": n, "end": n + 0.9, "text": f"word {n}"} for n in range(6)]
TALK = Annotation(
    "all words", task="asr", id="talk", duration_seconds=6.0, extra={"segments": SEGMENTS}
)


@pytest.fixture(scope="module")
def codec(tiny_whisper: Path) -> WhisperText:
    return WhisperText(PretrainedWhisper(str(tiny_whisper)).tokenizer)


@pytest.fixture(scope="module")
def ramp() -> np.ndarray:
    """Six seconds whose samples tell where they are."""
    return np.linspace(0.01, 0.6, 96_000).astype(np.float32)


def build(
    codec: WhisperText,
    samples: np.ndarray,
    annotation: Annotation,
    mode: LongClips,
    position: int = 0,
    max_seconds: float = 2.0,
    kind: str = "WAV",
) -> Example | SkippedSample:
    limits = ClipLimits(max_seconds=max_seconds)
    builder = ExampleBuilder(LogMel(80), codec, limits, on_device=True, long_clips=mode)
    audio = encode_audio(samples, kind=kind)
    return builder(Sample("key", "tar/a.tar", audio, kind.lower(), annotation), "music", position)


def used(example: Example | SkippedSample) -> torch.Tensor:
    assert isinstance(example, Example), example
    return example.audio


def reason(example: Example | SkippedSample) -> SkipReason:
    assert isinstance(example, SkippedSample)
    return example.reason


@pytest.mark.parametrize("mode", ["trim", "crop", "chunk"])
@pytest.mark.parametrize("annotation", [CAPTION, TRANSCRIPT], ids=["caption", "transcript"])
def test_a_clip_that_is_a_little_too_long_loses_its_end(
    codec, ramp: np.ndarray, mode: LongClips, annotation: Annotation
):
    for seconds in (2.01, 2.5):
        example = build(codec, ramp[: round(seconds * 16_000)], annotation, mode)
        np.testing.assert_allclose(used(example), ramp[:32_000], atol=1e-4)
        assert example.is_cut
    example = build(codec, ramp[:32_000], annotation, mode)
    assert len(used(example)) == 32_000
    assert not example.is_cut


def test_without_cropping_longer_clips_are_skipped(codec, ramp: np.ndarray):
    assert reason(build(codec, ramp, CAPTION, "trim")) is SkipReason.TOO_LONG
    assert reason(build(codec, ramp[:32_100], CAPTION, "skip")) is SkipReason.TOO_LONG
    for mode in ("crop", "chunk"):
        assert reason(build(codec, ramp, TRANSCRIPT, mode)) is SkipReason.TOO_LONG


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_a_crop_is_a_window_that_the_position_decides(codec, ramp: np.ndarray, kind: str):
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, len(ramp)).astype(np.float32)
    whole = used(build(codec, noise, CAPTION, "trim", max_seconds=6.0, kind=kind))
    starts = set()
    for position in range(5):
        part = used(build(codec, noise, CAPTION, "crop", position, kind=kind))
        again = used(build(codec, noise, CAPTION, "crop", position, kind=kind))
        assert torch.equal(part, again)
        assert len(part) == 32_000
        windows = whole.unfold(0, len(part), 1)
        distance = (windows[:, :50] - part[:50]).abs().sum(1)
        start = int(distance.argmin())
        torch.testing.assert_close(part, windows[start], atol=1e-3, rtol=0)
        starts.add(start)
    assert len(starts) == 5


def test_a_chunk_is_cut_at_segments_and_has_their_text(codec, ramp: np.ndarray):
    found = Counter()
    for position in range(12):
        example = build(codec, ramp, TALK, "chunk", position)
        audio, text = used(example), example.target.text
        first = int(text.split()[1])
        expected = ["word 5"] if first == 5 else [f"word {first}", f"word {first + 1}"]
        assert text == " ".join(expected)
        seconds = 0.9 if first == 5 else 1.9
        start = first * 16_000
        np.testing.assert_allclose(audio, ramp[start : start + round(seconds * 16_000)], atol=1e-4)
        found[text] += 1
    assert len(found) > 3
    whole = build(codec, ramp, TALK, "chunk", max_seconds=6.0)
    assert isinstance(whole, Example)
    assert (whole.target.text, whole.is_cut) == ("all words", False)


@pytest.mark.parametrize(
    "segments",
    [
        "x",
        [1],
        [{"start": 1}],
        [{"start": "a", "end": 2, "text": ""}],
        [{"start": 10**400, "end": 2, "text": ""}],
    ],
)
def test_segments_of_another_form_are_skipped(codec, ramp: np.ndarray, segments: object):
    annotation = Annotation("words", task="asr", extra={"segments": segments})
    assert reason(build(codec, ramp, annotation, "chunk")) is SkipReason.BAD_JSON


def test_a_segment_after_the_end_of_the_file_is_skipped(codec, ramp: np.ndarray):
    late = {"segments": [{"start": 50.0, "end": 51.0, "text": "late"}]}
    annotation = Annotation("words", task="asr", extra=late)
    assert isinstance(build(codec, ramp, annotation, "chunk"), SkippedSample)
    late["segments"] = [{"start": 5.0, "end": 7.0, "text": "late"}]  # of which the file has half
    assert reason(build(codec, ramp, annotation, "chunk")) is SkipReason.BAD_JSON


@pytest.mark.parametrize("end", [1.0, 0.5], ids=["empty", "reversed"])
def test_a_chunk_does_not_leave_out_words_between_its_segments(end: float):
    spoken = [(0.0, 1.0, "a"), (1.0, end, "lost"), (1.5, 2.0, "b")]
    segments = [{"start": start, "end": stop, "text": text} for start, stop, text in spoken]
    annotation = Annotation(duration_seconds=9.0, extra={"segments": segments})
    drawn = [annotation.draw_chunk(4.0, position) for position in range(20)]
    assert {one[0].text for one in drawn if one} == {"a", "b"}


def test_a_recording_with_segments_that_is_a_little_too_long_loses_its_end(codec, ramp: np.ndarray):
    example = build(codec, ramp, TALK, "chunk", max_seconds=5.8)
    np.testing.assert_allclose(used(example), ramp[: round(5.8 * 16_000)], atol=1e-4)
    assert isinstance(example, Example)
    assert example.target.text == "all words"


def test_texts_are_cleaned_and_unique():
    texts = ["rain", " rain ", "", None, 7, {"no": "text"}, "\ud800"]
    annotation = Annotation.from_mapping({"text": texts})
    assert (annotation.text, annotation.texts) == ("rain", ("rain", "7"))
    assert Annotation.from_mapping({"text": "a", "texts": ["b", "a"]}).texts == ("a", "b")
    assert Annotation.from_mapping({"text": "a", "texts": "b"}).texts == ("a",)
    assert Annotation().texts == ()


def test_training_draws_one_of_several_texts_and_validation_keeps_all_as_references(codec):
    annotation = Annotation.from_mapping({"text": ["a dog", "dogs bark", "barking"], "id": "x"})
    audio = encode_audio(np.full(8_000, 0.1, np.float32))
    sample = Sample("key", "tar/a.tar", audio, "flac", annotation)
    valid = ExampleBuilder(LogMel(80), codec, ClipLimits())
    train = ExampleBuilder(LogMel(80), codec, ClipLimits(), Augment(AugmentSettings(spec=False)))
    drawn = [train(sample, "sound", position).target.text for position in range(12)]
    assert set(drawn) == set(annotation.texts)
    assert drawn == [train(sample, "sound", position).target.text for position in range(12)]
    batch = collate([valid(sample, "sound", 0), valid(sample, "sound", 5)], [], 80)
    assert batch.texts == ("a dog", "a dog")
    assert batch.references == (annotation.texts, annotation.texts)
    single = Sample("key", "tar/a.tar", audio, "flac", Annotation("a dog"))
    assert collate([valid(single, "sound", 0)], [], 80).references == (("a dog",),)


def test_a_chunk_of_nothing_is_none():
    assert Annotation(extra={"segments": []}).draw_chunk(30, 0) is None
    too_long = [{"start": 0, "end": 31, "text": "x"}]
    assert Annotation(extra={"segments": too_long}).draw_chunk(30, 0) is None
    with pytest.raises(SkipSample):
        Annotation(extra={"segments": 3}).draw_chunk(30, 0)
