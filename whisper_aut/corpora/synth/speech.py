"""One clip of speech: a sentence or a keyword, in one of many voices, with a little noise and room.

In: a generator and the clip's number, which decides between sentence and keyword. Out: a waveform `[S]` and its annotation;
`label`, the keyword, stands on keyword clips only, so that a probe can ask which word was spoken. Next: `render`.
"""

import _ctypes
import ctypes
import re
from dataclasses import dataclass

import numpy as np
import soxr

from whisper_aut.corpora.synth.signals import (
    SAMPLE_RATE_HZ,
    SMALL_ROOM,
    at_level,
    draw_room,
    pick,
    placed,
    samples_in,
    uniform,
    with_background,
)
from whisper_aut.data.annotation import Annotation
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


KEYWORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("yes", "no", "stop", "go", "left", "right"),
)
CARRIERS = (
    "{}",
    "{}",
    "{}",
    "say {}",
    "the word is {}",
    "please say {} again",
    "i said {}",
    "it was {} this time",
)

GRAMMAR: dict[str, tuple[str, ...]] = {
    "sentence": (
        *(
            "{person} {did} the {adjective} {thing} {place}.",
            "the {adjective} {animal} {moved} {place}.",
        ),
        *(
            "{person} paid {number} dollars for the {thing}.",
            "the {transport} to {city} leaves at {time}.",
        ),
        *("please {command} the {thing} {place}.", "{command} the {thing} before {time}."),
        *("can you {command} the {adjective} {thing}?", "where did {person} leave the {thing}?"),
        *(
            "it will be {weather} in {city} on {day}.",
            "my {relative} has {number} {animal}s and a {thing}.",
        ),
        *(
            "on {day} {person} {did} {number} {thing}s.",
            "{person} and {person} met {place} at {time}.",
        ),
        *(
            "i think the {thing} is {adjective}.",
            "why is the {animal} so {adjective}?",
            "turn {turn} after {number} miles.",
        ),
        *(
            "we {did} the {thing} because it was {adjective}.",
            "nobody knew that {person} {did} the {thing}.",
        ),
        *("there are {number} {adjective} {thing}s {place}.", "set an alarm for {time} on {day}."),
        *(
            "{person} lives at {number} {street} street in {city}.",
            "my {relative} {did} it {often}.",
        ),
        *("the {weather} morning made the {animal} {adjective}.", "call {person} {often}, please."),
    ),
    "person": (
        *(
            "anna",
            "peter",
            "maria",
            "john",
            "susan",
            "david",
            "laura",
            "michael",
            "emma",
            "thomas",
            "julia",
            "robert",
        ),
        *("my {relative}", "the {job}", "our {job}", "her {relative}"),
    ),
    "relative": (
        "mother",
        "father",
        "sister",
        "brother",
        "uncle",
        "aunt",
        "cousin",
        "neighbour",
        "friend",
    ),
    "job": (
        "doctor",
        "teacher",
        "baker",
        "driver",
        "farmer",
        "painter",
        "nurse",
        "pilot",
        "sailor",
        "writer",
        "lawyer",
    ),
    "did": (
        *(
            "bought",
            "found",
            "lost",
            "painted",
            "carried",
            "opened",
            "cleaned",
            "sold",
            "borrowed",
            "dropped",
            "fixed",
        ),
        *(
            "wanted",
            "watched",
            "counted",
            "forgot",
            "remembered",
            "sent",
            "took",
            "moved",
            "liked",
            "broke",
            "saw",
        ),
    ),
    "command": (
        "open",
        "close",
        "bring",
        "move",
        "clean",
        "find",
        "fix",
        "sell",
        "paint",
        "check",
        "lift",
        "hide",
        "take",
    ),
    "thing": (
        *(
            "book",
            "chair",
            "window",
            "letter",
            "bottle",
            "clock",
            "ladder",
            "guitar",
            "lamp",
            "garden",
            "picture",
            "basket",
        ),
        *(
            "table",
            "jacket",
            "kettle",
            "wallet",
            "camera",
            "bicycle",
            "pillow",
            "mirror",
            "ticket",
            "hammer",
            "radio",
            "boat",
        ),
        *(
            "apple",
            "sandwich",
            "blanket",
            "button",
            "candle",
            "computer",
            "cupboard",
            "engine",
            "map",
            "parcel",
            "ring",
        ),
    ),
    "animal": (
        "dog",
        "cat",
        "horse",
        "bird",
        "goat",
        "rabbit",
        "cow",
        "duck",
        "turtle",
        "tiger",
        "monkey",
        "spider",
    ),
    "adjective": (
        *(
            "old",
            "new",
            "red",
            "green",
            "heavy",
            "broken",
            "empty",
            "quiet",
            "tiny",
            "large",
            "strange",
            "cheap",
            "warm",
        ),
        *(
            "dark",
            "bright",
            "wooden",
            "round",
            "dusty",
            "yellow",
            "clever",
            "happy",
            "slow",
            "famous",
            "gentle",
            "hungry",
        ),
    ),
    "moved": (
        "ran",
        "slept",
        "waited",
        "jumped",
        "walked",
        "hid",
        "looked around",
        "fell",
        "sat",
        "danced",
        "played",
    ),
    "place": (
        *(
            "in the kitchen",
            "near the river",
            "behind the house",
            "under the bridge",
            "at the station",
            "in {city}",
        ),
        *(
            "on the roof",
            "by the lake",
            "in the forest",
            "at the market",
            "next to the church",
            "upstairs",
            "on the hill",
        ),
    ),
    "city": (
        "london",
        "paris",
        "boston",
        "berlin",
        "madrid",
        "chicago",
        "dublin",
        "oslo",
        "vienna",
        "toronto",
        "sydney",
    ),
    "transport": ("train", "bus", "ferry", "plane", "tram", "coach"),
    "time": (
        "{hour} o'clock",
        "half past {hour}",
        "a quarter to {hour}",
        "{hour} thirty",
        "noon",
        "midnight",
    ),
    "hour": (
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ),
    "number": (
        *(
            "two",
            "three",
            "five",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "fifteen",
            "sixteen",
            "ninety",
        ),
        *("{tens}", "{tens} {unit}", "{unit} hundred", "{unit} thousand"),
    ),
    "tens": ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty"),
    "unit": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "weather": ("sunny", "rainy", "cloudy", "windy", "cold", "foggy", "stormy", "hot", "icy"),
    "turn": ("left", "right", "around"),
    "street": ("park", "oak", "church", "mill", "station", "king", "lake", "bridge", "garden"),
    "often": (
        "every day",
        "twice a week",
        "last summer",
        "yesterday",
        "tomorrow",
        "once more",
        "at night",
        "again",
    ),
}


def sentence(rng: np.random.Generator) -> str:
    """Expand `sentence` until no symbol is left."""
    text = "{sentence}"
    while "{" in text:
        text = re.sub(r"\{(\w+)\}", lambda symbol: pick(rng, GRAMMAR[symbol[1]]), text, count=1)
    return text


def keyword_phrase(rng: np.random.Generator, keyword: str) -> str:
    """Return a keyword alone or in a carrier phrase that holds no other keyword."""
    return pick(rng, CARRIERS).format(keyword) + "."


def transcript(spoken: str) -> str:
    """Return the words alone, as the decoder learns to write them."""
    return re.sub(r"[^a-z' ]", "", spoken.lower()).strip()


ACCENTS = {
    "american": "gmw/en-US",
    "british": "gmw/en",
    "received": "gmw/en-GB-x-rp",
    "scottish": "gmw/en-GB-scotland",
}
VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5"),
    *("Alex", "Andy", "Annie", "belinda", "steph", "linda", "john", "grandma", "grandpa"),
)
WORDS_PER_MINUTE = (115, 230)
SIGNAL_TO_NOISE_DB = (8, 40)
MIN_SECONDS, MAX_SECONDS = 1.0, 12.0
AUDIBLE = 0.01  # of the peak: espeak-ng pads an utterance with silence below this


def draw_voice(rng: np.random.Generator) -> tuple[Voice, str]:
    """Draw a speaker and a manner; return the accent's name as well."""
    accent = pick(rng, list(ACCENTS))
    rate, pitch, spread = rng.integers(
        (WORDS_PER_MINUTE[0], 25, 25), (WORDS_PER_MINUTE[1] + 1, 76, 76)
    )
    return Voice(
        f"{ACCENTS[accent]}+{pick(rng, VARIANTS)}", int(rate), int(pitch), int(spread)
    ), accent


def render_speech(rng: np.random.Generator, number: int) -> tuple[np.ndarray, Annotation]:
    """Render one clip: every second one is a keyword, `number` deciding which, so that every split is balanced."""
    keyword = KEYWORDS[number // 2 % len(KEYWORDS)] if number % 2 else None
    spoken = keyword_phrase(rng, keyword) if keyword else sentence(rng)
    voice, accent = draw_voice(rng)
    waveform = _with_pauses(rng, speak(spoken, voice, seed=int(rng.integers(1, 2**31))))
    room, _ = draw_room(rng, (SMALL_ROOM,), dry_share=0.75)
    waveform = placed(rng, waveform, room, tilt_db=2)
    waveform, _ = with_background(rng, waveform, uniform(rng, SIGNAL_TO_NOISE_DB))
    extra = {"voice": voice.name, "accent": accent, "words_per_minute": voice.words_per_minute}
    annotation = Annotation(
        transcript(spoken), domain="speech", task="asr", label=keyword, language="en", extra=extra
    )
    return at_level(waveform, uniform(rng, (-20, -2))), annotation


def _with_pauses(rng: np.random.Generator, waveform: np.ndarray) -> np.ndarray:
    """Cut the engine's own silences and set the words somewhere in a clip of at least `MIN_SECONDS`."""
    audible = np.flatnonzero(np.abs(waveform) > AUDIBLE * np.abs(waveform).max())
    words = waveform[audible[0] : audible[-1] + 1][: samples_in(MAX_SECONDS - 0.5)]
    before, after = (samples_in(uniform(rng, (0.05, 0.25))) for _ in range(2))
    missing = max(0, samples_in(MIN_SECONDS) - len(words) - before - after)
    before += int(rng.integers(0, missing + 1))
    clip = np.zeros(max(samples_in(MIN_SECONDS), before + len(words) + after), dtype=np.float32)
    clip[before : before + len(words)] = words
    return clip
