"""Log-mel against `transformers.WhisperFeatureExtractor`, frame by frame."""

import pytest
import torch
from transformers import WhisperFeatureExtractor

from whisper_aut.audio.logmel import (
    MAX_MEL_FRAMES,
    LogMel,
    frames_with_context,
    mel_frames,
    silence_level,
)


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("seconds", [0.01, 0.1, 1.0, 5.0, 5.00006, 29.975, 29.99, 30.0])
def test_equals_the_feature_extractor(bins: int, seconds: float):
    waveform = (
        torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(0)) * 0.1
    )
    reference = WhisperFeatureExtractor(feature_size=bins)(
        waveform.numpy(), sampling_rate=16_000, return_tensors="pt"
    )
    expected = reference.input_features[0].T
    ours = LogMel(bins)(waveform)
    assert len(ours) == frames_with_context(mel_frames(len(waveform)))
    torch.testing.assert_close(ours, expected[: len(ours)], atol=1e-5, rtol=0)
    # What lies past the context is one value, the clip's floor: nothing of the audio is cut off.
    rest = expected[len(ours) :]
    torch.testing.assert_close(rest, silence_level(ours).expand_as(rest), atol=1e-5, rtol=0)


def test_valid_frames_are_those_of_the_extractors_mask():
    extractor = WhisperFeatureExtractor(feature_size=80)
    for samples in (1, 159, 160, 161, 16_000, 479_999):
        mask = extractor(
            [0.1] * samples, sampling_rate=16_000, return_attention_mask=True
        ).attention_mask[0]
        assert mel_frames(samples) == mask.sum()


def test_very_quiet_and_silent_clips_keep_whispers_floor():
    quiet = LogMel(80)(torch.zeros(16_000))
    assert torch.equal(quiet, torch.full_like(quiet, -1.5))
    assert silence_level(quiet) == -1.5


def test_a_clip_does_not_depend_on_what_was_computed_before():
    logmel, clip = LogMel(80), torch.randn(8_000)
    first = logmel(clip)
    logmel(torch.randn(80_000) * 100)
    assert torch.equal(first, logmel(clip))


@pytest.mark.parametrize("shape", [(0,), (480_001,), (2, 16_000)])
def test_refuses_what_it_cannot_window(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="samples of one channel"):
        LogMel(80)(torch.zeros(shape))


def test_frames_never_exceed_whispers_window():
    assert frames_with_context(mel_frames(480_000)) == MAX_MEL_FRAMES
