import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from whisper_aut.corpora.recipes.base import with_article
from whisper_aut.corpora.synth import signals
from whisper_aut.corpora.synth.music import (
    INSTRUMENTS,
    MUSIC_LABELS,
    play_note,
    render_music,
    write_score,
)
from whisper_aut.corpora.synth.signals import MAX_CAPTION_WORDS, SAMPLE_RATE_HZ, caption
from whisper_aut.corpora.synth.sounds import SOUND_CLASSES, SOUND_LABELS, render_sound
from whisper_aut.corpora.synth.speech import (
    ACCENTS,
    CARRIERS,
    GRAMMAR,
    KEYWORDS,
    VARIANTS,
    Voice,
    draw_sentence,
    render_speech,
    speak,
    transcript,
)

RENDERED = [
    *((render_sound, SOUND_LABELS, index) for index in range(2 * len(SOUND_LABELS))),
    *((render_music, MUSIC_LABELS, index) for index in range(2 * len(MUSIC_LABELS))),
]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_can_be_stored(waveform: np.ndarray) -> None:
    assert waveform.dtype == np.float32
    assert np.isfinite(waveform).all()
    assert 1 <= len(waveform) / SAMPLE_RATE_HZ <= 12
    assert 0.05 < np.abs(waveform).max() < 1


# Sound and music


def test_there_are_enough_classes_with_distinct_names():
    assert len(SOUND_LABELS) >= 12
    assert len(MUSIC_LABELS) >= 10
    assert len({*SOUND_LABELS, *MUSIC_LABELS}) == len(SOUND_LABELS) + len(MUSIC_LABELS)


@pytest.mark.parametrize(("render", "labels", "index"), RENDERED, ids=lambda value: str(value)[:24])
def test_a_clip_can_be_stored_and_has_a_short_lower_case_caption(render, labels, index: int):
    waveform, annotation = render(generator(index), index)
    assert_can_be_stored(waveform)
    assert annotation.label == labels[index % len(labels)]
    assert annotation.text == " ".join(annotation.text.lower().split())
    assert len(annotation.text.split()) <= MAX_CAPTION_WORDS
    assert annotation.text.replace(" ", "").replace("'", "").isalpha()


@pytest.mark.parametrize("label", SOUND_LABELS)
def test_a_class_of_sound_varies_and_has_the_requested_length(label: str):
    for samples in (19_200, 32_123):
        one, other = (
            SOUND_CLASSES[label].synthesise(generator(seed), samples)[0] for seed in (1, 2)
        )
        assert len(one) == len(other) == samples
        assert np.abs(one).max() > 0
        assert not np.allclose(one, other)


def test_captions_of_one_class_differ_and_name_attributes():
    texts = {render_sound(generator(seed), SOUND_LABELS.index("dog"))[1].text for seed in range(12)}
    assert len(texts) >= 10
    assert all("dog" in text for text in texts)
    counts = ("once", "twice", "three times", "repeatedly")
    assert any(word in text for text in texts for word in counts)


@pytest.mark.parametrize("label", INSTRUMENTS)
def test_an_instrument_plays_the_requested_pitch(label: str):
    instrument = INSTRUMENTS[label].vary(generator(3))
    note = play_note(generator(3), instrument, 440.0, 0.8)
    assert np.isfinite(note).all()
    peak_hz = np.argmax(np.abs(np.fft.rfft(note))) * SAMPLE_RATE_HZ / len(note)
    partials = np.array(instrument.ratios or range(1, 20))
    assert np.abs(partials - peak_hz / 440).min() < 0.04 * peak_hz / 440


def test_a_score_stays_in_its_key_and_its_clip():
    for seed, instrument in enumerate([*INSTRUMENTS.values()] * 2):
        score = write_score(generator(seed), instrument, seconds=3.0)
        assert score.notes
        assert all(0 <= onset < 3 and length > 0 for onset, length, _ in score.notes)
        assert len({pitch % 12 for _, _, pitch in score.notes}) <= 7


# Speech


def test_sentences_vary_and_are_fully_expanded():
    rng = generator()
    sentences = {draw_sentence(rng) for _ in range(400)}
    assert len(sentences) > 380
    assert not any("{" in text or "}" in text for text in sentences)
    assert len({word for text in sentences for word in transcript(text).split()}) > 250
    assert all(transcript(text) == transcript(text).lower().strip() for text in sentences)


def test_every_symbol_of_the_grammar_is_reachable_and_defined():
    rules = " ".join(rule for rules in GRAMMAR.values() for rule in rules)
    assert {*re.findall(r"\{(\w+)\}", rules), "sentence"} == set(GRAMMAR)


def test_a_carrier_phrase_has_no_keyword_of_its_own():
    assert len(KEYWORDS) >= 12
    for carrier in CARRIERS:
        assert not set(carrier.split()) & set(KEYWORDS)


def test_speech_alternates_between_sentences_and_keywords():
    pytest.importorskip("espeakng_loader")
    for index in range(8):
        waveform, annotation = render_speech(generator(index), index)
        assert_can_be_stored(waveform)
        assert (annotation.task, annotation.language) == ("asr", "en")
        if index % 2:
            assert annotation.text.split().count(annotation.label) == 1
        else:
            assert annotation.label is None


def speak_as(number: int) -> bytes:
    voices = ("gmw/en-US+f2", "gmw/en+m3", "gmw/en-GB-scotland+grandma", "gmw/en-GB-x-rp+f4")
    return speak("the quick brown fox", Voice(voices[number % 4], 170, 50, 50), seed=5).tobytes()


def test_an_utterance_does_not_depend_on_earlier_ones_or_on_the_process():
    pytest.importorskip("espeakng_loader")
    alone = [speak_as(number) for number in range(4)]
    assert [speak_as(number) for number in (3, 2, 1, 0)] == alone[::-1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(speak_as, (2, 2, 0))) == [alone[2], alone[2], alone[0]]
    assert len(set(alone)) == 4


def test_every_voice_speaks_at_its_rate():
    pytest.importorskip("espeakng_loader")
    for accent in ACCENTS.values():
        for variant in VARIANTS:
            voice = Voice(f"{accent}+{variant}", 170, 50, 50)
            assert np.abs(speak("yes", voice, seed=1)).max() > 0.05
    slow, fast = (
        speak("one two three four", Voice("gmw/en", rate, 50, 50), seed=1) for rate in (110, 240)
    )
    assert len(slow) > 1.5 * len(fast)


# Building blocks


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


def test_a_grain_is_cut_at_the_end_of_the_clip():
    clip = signals.add_grains(100, [0.0, 90 / SAMPLE_RATE_HZ, 1.0], [np.ones(10, np.float32)] * 3)
    assert (clip.sum(), clip[:10].sum(), clip[90:].sum()) == (20, 10, 10)


def test_groups_of_onsets_have_pauses_between_them():
    onsets = signals.draw_onsets(generator(), 160_000, 5.0, (3, 3), (1.0, 1.5), jitter=0)
    intervals = np.diff(onsets)
    assert np.allclose(intervals[np.arange(len(intervals)) % 3 < 2], 0.2)
    assert intervals[2::3].min() >= 1.0


def test_background_noise_has_the_requested_level():
    tone = signals.unit_rms(signals.harmonic_tone(np.full(64_000, 500.0), (1.0,)))
    recording = signals.record(
        generator(), tone, (10, 10), dry_probability=1, tilt_db=0, peak_db=(-3, -3)
    )
    assert np.abs(recording.waveform).max() == pytest.approx(10 ** (-3 / 20))
    gain = np.dot(recording.waveform, tone) / np.dot(tone, tone)
    noise = recording.waveform / gain - tone
    assert -20 * np.log10(np.sqrt(np.mean(noise**2))) == pytest.approx(10, abs=1.5)
    assert recording.noise
    assert recording.room == ""


def test_only_a_hall_has_an_echo():
    click = np.zeros(32_000, dtype=np.float32)
    click[1_000] = 1
    dry, hall = (
        signals.filter_recording(generator(), click, room, tilt_db=1)
        for room in (None, signals.LARGE_HALL)
    )
    assert len(dry) == len(hall) == len(click)
    late = slice(1_000 + SAMPLE_RATE_HZ // 5, None)
    assert np.mean(hall[late] ** 2) > 100 * np.mean(dry[late] ** 2)


def test_captions_leave_out_long_phrases():
    long = "in a very " + "long " * 12 + "hall"
    text = caption(generator(), "a dog barks", ["twice", "", long, "indoors"], keep=1)
    assert text == "a dog barks twice indoors"
    counts = [signals.count_word(count) for count in (1, 3, 9)]
    assert counts == ["once", "three times", "repeatedly"]
    assert with_article("organ") == "an organ"
