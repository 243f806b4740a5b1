"""probes.baseline: the valid log-mel frames, and nothing past a clip's end."""

import pytest
import torch

from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.probes.encoders import LogMelBaseline


@pytest.mark.parametrize("samples", [1_600, 1_601, 16_000, 479_900])
def test_frames_are_the_valid_ones(samples):
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    frames = LogMelBaseline().encode([waveform], 16_000)[0]
    assert frames.shape == (mel_frames(samples), 80)
    assert torch.equal(frames, LogMel(80)(waveform)[: mel_frames(samples)])


def test_other_rates_are_resampled():
    tone = torch.sin(torch.arange(8_000) / 8_000 * 2 * torch.pi * 440)
    slow, fast = (
        LogMelBaseline().encode([tone], 8_000)[0],
        LogMelBaseline().encode([tone], 16_000)[0],
    )
    assert (len(slow), len(fast)) == (100, 50)
    assert slow.mean(0).argmax() < fast.mean(0).argmax()


def test_fingerprint_follows_the_features():
    assert (
        LogMelBaseline().fingerprint()
        == LogMelBaseline(80).fingerprint()
        != LogMelBaseline(128).fingerprint()
    )
    assert LogMelBaseline(128).width == 128
