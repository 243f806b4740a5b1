"""Audio that broke other tools, as their users reported it."""

import io
import struct

import numpy as np
import pytest
import soundfile

from tests.support.audio import encode_audio, tone
from whisper_aut.audio.decode import ClipLimits, load_waveform
from whisper_aut.errors import SkipSample

WAV = encode_audio(tone(1.0), kind="WAV", subtype="PCM_16")


def test_a_streamed_wav_whose_header_states_two_billion_samples():
    """lhotse-speech/lhotse#913: a recording of 54 s was listed with 268,435 s.

    A program that writes to a pipe cannot go back to fill in the sizes.
    """
    data = bytearray(WAV)
    struct.pack_into("<I", data, 4, 0xFFFFFFFF)
    struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFFFFFF)
    assert len(load_waveform(bytes(data), ClipLimits())) == 16_000


@pytest.mark.parametrize("field", ["channels", "sample rate", "block size"])
def test_a_header_with_zeros_to_divide_by(field: str):
    """pytorch/audio#2870: some files ended Python with a floating point exception."""
    data = bytearray(WAV)
    offset, size = {"channels": (22, 2), "sample rate": (24, 4), "block size": (32, 2)}[field]
    data[offset : offset + size] = bytes(size)
    if field == "block size":  # which follows from other fields
        assert len(load_waveform(bytes(data), ClipLimits())) == 16_000
    else:
        with pytest.raises(SkipSample, match="undecodable"):
            load_waveform(bytes(data), ClipLimits())


def test_float_samples_of_1e29():
    """Plachtaa/seed-vc#108: one file had samples above 1e29, and the loss became NaN."""
    samples = np.array(tone(1.0))
    samples[8000] = 2e29
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(SkipSample, match="out of scale"):
        load_waveform(buffer.getvalue(), ClipLimits())
