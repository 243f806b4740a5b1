import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from whisper_aut.corpora.synth import signals
from whisper_aut.corpora.synth import signals as room
from whisper_aut.corpora.synth.music import (
    INSTRUMENTS,
    MUSIC_LABELS,
    play_note,
    render_music,
    specimen,
    write_score,
)
from whisper_aut.corpora.synth.signals import (
    MAX_WORDS,
    SAMPLE_RATE_HZ,
    SOUND_CLASSES,
    article,
    composed,
    times_word,
)
from whisper_aut.corpora.synth.sounds import SOUND_LABELS, render_sound
from whisper_aut.corpora.synth.speech import (
    ACCENTS,
    CARRIERS,
    GRAMMAR,
    KEYWORDS,
    VARIANTS,
    Voice,
    keyword_phrase,
    render_speech,
    sentence,
    speak,
    transcript,
)

RENDERED = [
    *((render_sound, SOUND_LABELS, number) for number in range(2 * len(SOUND_LABELS))),
    *((render_music, MUSIC_LABELS, number) for number in range(2 * len(MUSIC_LABELS))),
]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def peak_hz(waveform: np.ndarray) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(waveform))) * SAMPLE_RATE_HZ / len(waveform))


def assert_fit_to_store(waveform: np.ndarray) -> None:
    assert waveform.dtype == np.float32
    assert np.isfinite(waveform).all()
    assert 1 <= len(waveform) / SAMPLE_RATE_HZ <= 12
    assert 0.05 < np.abs(waveform).max() < 1


# --------------------------------------------------------------------------------------------------- sound and music


def test_there_are_classes_enough():
    assert len(SOUND_LABELS) >= 12
    assert len(MUSIC_LABELS) >= 10
    assert len(set(SOUND_LABELS + MUSIC_LABELS)) == len(SOUND_LABELS) + len(MUSIC_LABELS)


@pytest.mark.parametrize(
    ("render", "labels", "number"), RENDERED, ids=lambda value: str(value)[:24]
)
def test_a_clip_can_be_stored_and_its_caption_is_short_lower_case_english(
    render, labels, number: int
):
    waveform, annotation = render(generator(number), number)
    assert_fit_to_store(waveform)
    assert annotation.label == labels[number % len(labels)]
    assert annotation.text == " ".join(annotation.text.lower().split())
    assert len(annotation.text.split()) <= MAX_WORDS
    assert annotation.text.replace(" ", "").replace("'", "").isalpha()


@pytest.mark.parametrize("label", SOUND_LABELS)
def test_a_class_of_sound_varies_and_fills_the_length_asked_for(label: str):
    kind = SOUND_CLASSES[label]
    for samples in (19_200, 32_123):
        one, other = (kind.render(generator(seed), samples).waveform for seed in (1, 2))
        assert len(one) == len(other) == samples
        assert np.abs(one).max() > 0
        assert not np.allclose(one, other)


def test_captions_of_one_class_differ_and_name_attributes():
    texts = {render_sound(generator(seed), SOUND_LABELS.index("dog"))[1].text for seed in range(12)}
    assert len(texts) >= 10
    assert all("dog" in text for text in texts)
    assert any(
        word in text for text in texts for word in ("once", "twice", "three times", "repeatedly")
    )


@pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda instrument: instrument.label)
def test_an_instrument_sounds_at_the_pitch_asked_for(instrument):
    timbre = specimen(generator(3), instrument)
    note = play_note(generator(3), timbre, 440.0, 0.8)
    assert np.isfinite(note).all()
    harmonic = peak_hz(note) / 440
    partials = np.array(instrument.ratios or range(1, 20))
    assert np.abs(partials - harmonic).min() < 0.04 * harmonic


def test_a_score_keeps_to_its_key_and_its_clip():
    for seed in range(20):
        score = write_score(generator(seed), INSTRUMENTS[seed % len(INSTRUMENTS)], seconds=3.0)
        assert score.notes
        assert all(0 <= onset < 3 and length > 0 for onset, length, _ in score.notes)
        assert len({pitch % 12 for _, _, pitch in score.notes}) <= 7


# ---------------------------------------------------------------------------------------------------------- speech


def test_sentences_vary_and_leave_no_symbol():
    rng = generator()
    sentences = {sentence(rng) for _ in range(400)}
    assert len(sentences) > 380
    assert not any("{" in text or "}" in text for text in sentences)
    assert len({word for text in sentences for word in transcript(text).split()}) > 250
    assert all(transcript(text) == transcript(text).lower().strip() for text in sentences)


def test_every_symbol_of_the_grammar_is_reachable_and_defined():
    used = {
        symbol
        for rules in GRAMMAR.values()
        for rule in rules
        for symbol in re.findall(r"\{(\w+)\}", rule)
    }
    assert used | {"sentence"} == set(GRAMMAR)


def test_a_carrier_holds_its_keyword_only():
    assert len(KEYWORDS) >= 12
    for carrier in CARRIERS:
        assert not set(carrier.split()) & set(KEYWORDS)
    assert transcript(keyword_phrase(generator(), "seven")).split().count("seven") == 1


def test_speech_alternates_sentences_and_keywords():
    pytest.importorskip("espeakng_loader")
    for number in range(8):
        waveform, annotation = render_speech(generator(number), number)
        assert_fit_to_store(waveform)
        assert (annotation.task, annotation.language) == ("asr", "en")
        if number % 2:
            assert annotation.label in annotation.text.split()
        else:
            assert annotation.label is None


def spoken(number: int) -> bytes:
    voices = ("gmw/en-US+f2", "gmw/en+m3", "gmw/en-GB-scotland+grandma", "gmw/en-GB-x-rp+f4")
    return speak("the quick brown fox", Voice(voices[number % 4], 170, 50, 50), seed=5).tobytes()


def test_an_utterance_is_the_same_after_any_other_and_in_any_process():
    pytest.importorskip("espeakng_loader")
    alone = [spoken(number) for number in range(4)]
    assert [spoken(number) for number in (3, 2, 1, 0)] == alone[::-1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(spoken, (2, 2, 0))) == [alone[2], alone[2], alone[0]]
    assert len(set(alone)) == 4


def test_every_voice_speaks_and_obeys_its_rate():
    pytest.importorskip("espeakng_loader")
    for accent in ACCENTS.values():
        for variant in VARIANTS:
            assert (
                np.abs(speak("yes", Voice(f"{accent}+{variant}", 170, 50, 50), seed=1)).max() > 0.05
            )
    slow, fast = (
        speak("one two three four", Voice("gmw/en", rate, 50, 50), seed=1) for rate in (110, 240)
    )
    assert len(slow) > 1.5 * len(fast)


# ------------------------------------------------------------------------------------------------- building blocks


@pytest.mark.parametrize("slope", [0.0, -3.0, -6.0])
def test_coloured_noise_has_its_slope(slope: float):
    power = np.abs(np.fft.rfft(signals.coloured_noise(generator(), 1 << 17, slope))) ** 2
    hertz = np.fft.rfftfreq(1 << 17, 1 / SAMPLE_RATE_HZ)
    octave = [
        10 * np.log10(power[(hertz > low) & (hertz < 2 * low)].mean()) for low in (500, 2_000)
    ]
    assert (octave[1] - octave[0]) / 2 == pytest.approx(slope, abs=0.3)


def test_a_harmonic_tone_has_its_partials_and_no_aliases():
    tone = signals.harmonic_tone(np.full(16_000, 1_000.0), np.ones(40))
    spectrum = np.abs(np.fft.rfft(tone))
    strong = np.flatnonzero(spectrum > 0.1 * spectrum.max())
    assert strong.tolist() == [1_000 * number for number in range(1, 8)]


def test_what_is_laid_past_the_end_is_cut():
    clip = signals.lay(100, [0.0, 90 / SAMPLE_RATE_HZ, 1.0], [np.ones(10, np.float32)] * 3)
    assert (clip.sum(), clip[:10].sum(), clip[90:].sum()) == (20, 10, 10)


def test_bouts_pause_between_groups():
    groups = signals.bouts(generator(), 10.0, (3, 3), 5.0, (1.0, 1.5))
    assert all(len(group) == 3 for group in groups[:-1])
    assert all(later[0] - earlier[-1] >= 1.0 for earlier, later in pairwise(groups))


def test_background_noise_lies_as_far_below_as_asked():
    tone = signals.unit_rms(signals.harmonic_tone(np.full(64_000, 500.0), (1.0,)))
    noisy, name = room.with_background(generator(), tone, 10.0)
    assert name
    assert 20 * np.log10(1 / np.sqrt(np.mean((noisy - tone) ** 2))) == pytest.approx(10, abs=1)


def test_a_hall_rings_on_and_a_dry_place_does_not():
    click = np.zeros(32_000, dtype=np.float32)
    click[1_000] = 1
    dry, hall = (
        room.placed(generator(), click, place, tilt_db=1) for place in (None, room.LARGE_HALL)
    )
    assert len(dry) == len(hall) == len(click)
    late = slice(1_000 + SAMPLE_RATE_HZ // 5, None)
    assert np.mean(hall[late] ** 2) > 100 * np.mean(dry[late] ** 2)


def test_levels_and_words():
    assert np.abs(room.at_level(np.array([0.1, -0.2], np.float32), -20)).max() == pytest.approx(0.1)
    assert (times_word(1), times_word(3), times_word(9)) == ("once", "three times", "repeatedly")
    assert (article("organ"), article("piano")) == ("an organ", "a piano")
    text = composed(
        generator(),
        "a dog barks",
        ["twice", "", "in a very " + "long " * 12 + "hall", "indoors"],
        keep=1,
    )
    assert text == "a dog barks twice indoors"
