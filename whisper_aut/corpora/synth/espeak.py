"""Text → spoken words, through espeak-ng (https://github.com/espeak-ng/espeak-ng, GPL-3.0).

In: words, a voice, its rate and pitch. Out: a float32 waveform `[S]` at 16 kHz. Next: `speech`. The library and its voices come
with the wheel `espeakng-loader`, the extra `demo`; this is the only module that imports it.
"""

import _ctypes
import ctypes
from dataclasses import dataclass

import numpy as np
import soxr

from whisper_aut.corpora.synth.signals import SAMPLE_RATE_HZ
from whisper_aut.errors import UserError

# speak_lib.h of espeak-ng 1.52
SYNCHRONOUS_OUTPUT, UTF8_TEXT = 2, 1
RATE, PITCH, RANGE = 1, 3, 4
FULL_SCALE = 1 << 15
OnSamples = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Voice:
    """Who speaks and how.

    Attributes:
        name: an accent of espeak-ng with a variant, such as `gmw/en-US+f2`.
        words_per_minute: espeak-ng's measure of rate, 80 to 450.
        pitch, pitch_range: 0 to 100, about the variant's own pitch.
    """

    name: str
    words_per_minute: int
    pitch: int
    pitch_range: int


def speak(text: str, voice: Voice, seed: int) -> np.ndarray:
    """Speak a text; the same arguments give the same samples in any process and after any other utterance.

    The library is loaded anew for each utterance, because parts of its state (the phase of the voice's flutter, for one) are
    statics that neither `espeak_Initialize` nor a change of voice resets. That costs 4 ms and wants a C library whose `dlclose`
    unloads (glibc's and macOS's do, musl's does not).

    Raises:
        UserError: the extra `demo` is not installed.
    """
    espeakng_loader = _loader()
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        native_rate_hz = library.espeak_Initialize(
            SYNCHRONOUS_OUTPUT, 0, espeakng_loader.get_data_path().encode(), 0
        )
        if native_rate_hz <= 0:
            raise UserError(
                f"espeak-ng did not start with the voices at {espeakng_loader.get_data_path()}."
            )
        samples = _synthesise(library, text, voice, seed)
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    return soxr.resample(
        samples.astype(np.float32) / FULL_SCALE, native_rate_hz, SAMPLE_RATE_HZ, quality="HQ"
    )


def _loader():
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(
            "The demo corpus speaks through espeak-ng, which is not installed. Run: pip install 'whisper-aut[demo]'"
        ) from None
    return espeakng_loader


def _synthesise(library: ctypes.CDLL, text: str, voice: Voice, seed: int) -> np.ndarray:
    blocks: list[np.ndarray] = []

    @OnSamples
    def collect(samples, count: int, _events) -> int:
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)
    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    assert library.espeak_SetVoiceByName(voice.name.encode()) == 0, (
        f"espeak-ng has no voice {voice.name}"
    )
    for parameter, value in (
        (RATE, voice.words_per_minute),
        (PITCH, voice.pitch),
        (RANGE, voice.pitch_range),
    ):
        library.espeak_SetParameter(parameter, value, 0)
    encoded = text.encode()
    status = library.espeak_Synth(
        encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, UTF8_TEXT, None, None
    )
    assert status == 0, f"espeak-ng refused {text!r} (status {status})"
    assert blocks, f"espeak-ng said nothing for {text!r}"
    return np.concatenate(blocks)
