"""Sentences from a small grammar: statements, questions, commands, times, prices, names.

In: a generator. Out: one sentence as it is to be spoken, with punctuation for the voice's sake. Next: `speech` speaks it and
keeps its words as the transcript. Symbols stand in braces; every symbol is a tuple of alternatives.
"""

import re

import numpy as np

from whisper_aut.corpora.synth.signals import pick

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
