"""Encoded audio → samples, with every size bounded before anything is decoded.

In: the bytes of a `.flac .wav .ogg .mp3 .opus` file. Out: float32 samples and their rate, or `SampleRefused`. Next:
`corpora.build` checks clips with it, `data.waveform` makes them mono 16 kHz. Decoding is libsndfile's, through soundfile.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from whisper_aut.errors import Reason, SampleRefused

AUDIO_SUFFIXES = ("flac", "wav", "ogg", "mp3", "opus")
MAX_CHANNELS = 32
MAX_SAMPLE_RATE_HZ = 768_000
MIN_SAMPLE_RATE_HZ = 1_000
UNKNOWN_FRAMES = (
    2**63 - 1
)  # libsndfile's SF_COUNT_MAX: FLAC written to a pipe does not say how long it is


@dataclass(frozen=True)
class ClipLimits:
    """The bounds that a clip must keep.

    Attributes:
        min_seconds, max_seconds: duration, both ends allowed. Whisper's window ends at 30 s.
        max_bytes: encoded size.
        silence_peak: a clip whose largest sample magnitude stays below this is silent (full scale is 1).
    """

    min_seconds: float = 0.1
    max_seconds: float = 30.0
    max_bytes: int = 64 << 20
    silence_peak: float = 1e-5


LONG_CLIPS = ClipLimits(
    max_seconds=3600.0, max_bytes=1 << 30
)  # what is heard in windows, as against trained on


@dataclass(frozen=True)
class Clip:
    """Decoded audio: `samples` is float32 `[S]` or `[S, channels]`."""

    samples: np.ndarray
    sample_rate_hz: int
    codec: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate_hz


@dataclass(frozen=True)
class Header:
    """What an encoded clip says of itself; `seconds` is None where it does not say."""

    sample_rate_hz: int
    channels: int
    codec: str
    seconds: float | None


class _Forward(soundfile.SoundFile):
    """Reads without seeking, which libsndfile cannot do in a stream of unknown length."""

    def seekable(self) -> bool:
        return False


def decode(data: bytes, limits: ClipLimits) -> Clip:
    """Decode one clip, trusting neither its header nor its samples.

    Raises:
        SampleRefused: empty, too large, undecodable, outside the duration limits, silent, or with samples that are not
            finite. A header that promises more audio than the limit is refused before decoding, and decoding stops at the
            limit whatever the header says.
    """
    with _opened(data, limits, soundfile.SoundFile) as file:
        header = _checked_header(file, limits)
        samples = _read(file, limits) if header.seconds is not None else None
    if samples is None:
        with _opened(data, limits, _Forward) as file:
            samples = _read(file, limits)
    clip = Clip(samples, header.sample_rate_hz, header.codec)
    _check_samples(clip, limits)
    return clip


def read_header(data: bytes, limits: ClipLimits) -> Header:
    """Return what a clip's header says, without decoding; a header may lie, `decode` does not believe it.

    Raises:
        SampleRefused: empty, too large, not audio, or outside the duration limits by its own word.
    """
    with _opened(data, limits, soundfile.SoundFile) as file:
        header = _checked_header(file, limits)
    if header.seconds is not None:
        _check_not_shorter(header.seconds, limits)
    return header


@contextmanager
def opened_recording(path: Path) -> Iterator[soundfile.SoundFile]:
    """Open a file of which parts are to be read; how long it is does not matter, but it must say so.

    Raises:
        SampleRefused: undecodable, or of unknown length.
    """
    with _refusing(), soundfile.SoundFile(path) as file:
        _check_format(file)
        if file.frames == UNKNOWN_FRAMES:
            raise SampleRefused(
                Reason.UNDECODABLE, "no part can be cut from a stream of unknown length"
            )
        yield file


@contextmanager
def _opened(
    data: bytes, limits: ClipLimits, opener: type[soundfile.SoundFile]
) -> Iterator[soundfile.SoundFile]:
    if not data:
        raise SampleRefused(Reason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        raise SampleRefused(Reason.TOO_LARGE, f"{len(data)} bytes, limit {limits.max_bytes}")
    with _refusing(), opener(io.BytesIO(data)) as file:
        yield file


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what goes wrong in a decoder into a refusal."""
    try:
        yield
    except (
        soundfile.LibsndfileError
    ) as error:  # its str() holds a memory address, and ledgers should be comparable
        raise SampleRefused(Reason.UNDECODABLE, error.error_string) from None
    except (soundfile.SoundFileError, OSError, ValueError, TypeError, MemoryError) as error:
        raise SampleRefused(Reason.UNDECODABLE, str(error)) from None


def _read(file: soundfile.SoundFile, limits: ClipLimits) -> np.ndarray:
    # One second past the limit is enough to know that a clip is too long, and bounds what a lying header can cost.
    return file.read(int((limits.max_seconds + 1) * file.samplerate), dtype="float32")


def _checked_header(file: soundfile.SoundFile, limits: ClipLimits) -> Header:
    _check_format(file)
    rate = file.samplerate
    seconds = None if file.frames == UNKNOWN_FRAMES else file.frames / rate
    if seconds is not None:
        _check_not_longer(seconds, limits)
    return Header(rate, file.channels, f"{file.format}/{file.subtype}", seconds)


def _check_format(file: soundfile.SoundFile) -> None:
    if not MIN_SAMPLE_RATE_HZ <= file.samplerate <= MAX_SAMPLE_RATE_HZ:
        raise SampleRefused(Reason.UNDECODABLE, f"sample rate of {file.samplerate} Hz")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise SampleRefused(Reason.UNDECODABLE, f"{file.channels} channels")


def _check_not_longer(seconds: float, limits: ClipLimits) -> None:
    # Half a millisecond of grace: codecs and resamplers round a 30 s clip to a sample more or less.
    if seconds > limits.max_seconds + 5e-4:
        raise SampleRefused(Reason.TOO_LONG, f"{seconds:.3f} s, limit {limits.max_seconds:g} s")


def _check_not_shorter(seconds: float, limits: ClipLimits) -> None:
    if not seconds:
        raise SampleRefused(Reason.EMPTY, "no samples")
    if seconds < limits.min_seconds:
        raise SampleRefused(Reason.TOO_SHORT, f"{seconds:.3f} s, limit {limits.min_seconds:g} s")


def _check_samples(clip: Clip, limits: ClipLimits) -> None:
    _check_not_longer(clip.seconds, limits)
    _check_not_shorter(clip.seconds, limits)
    low, high = float(clip.samples.min()), float(clip.samples.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN and infinities survive min and max
        raise SampleRefused(Reason.NON_FINITE, "NaN or infinite samples")
    if max(-low, high) < limits.silence_peak:
        raise SampleRefused(Reason.SILENT, f"peak {max(-low, high):.1e}")
