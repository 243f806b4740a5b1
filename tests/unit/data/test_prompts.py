"""Annotation → question: which tasks a sample serves, what is drawn, what is refused."""

from collections import Counter

import pytest

from tests.support import REPOSITORY
from whisper_aut.config import load_settings
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.targets import OWN_TASK, Instruction, Instructions
from whisper_aut.errors import SkipReason, SkipSample, UserError
from whisper_aut.models.decoders import check_decoder

SAMPLES = {
    "transcription": Annotation(text="seven", task="asr", domain="speech"),
    "translation": Annotation(
        text="sieben", domain="speech", task="translation", extra={"translation": "seven"}
    ),
    "language": Annotation(domain="speech", task="language", language="de"),
    "gender": Annotation(domain="speech", task="gender", label="female"),
    "age": Annotation(domain="speech", task="age", label="thirties"),
    "accent": Annotation(domain="speech", task="accent", extra={"accent": "scottish"}),
    "emotion": Annotation(domain="speech", task="emotion", label="angry"),
    "keyword": Annotation(domain="speech", task="keyword", label="stop"),
    "intent": Annotation(domain="speech", task="intent", label="lights_off"),
    "speaker_count": Annotation(domain="speech", task="speaker_count", label="3"),
    "audio_caption": Annotation(text="rain falls", domain="sound", task="caption"),
    "sound_class": Annotation(domain="sound", task="sound_class", label="vacuum_cleaner"),
    "sound_events": Annotation(domain="sound", task="events", label=["rain", "dog"]),
    "acoustic_scene": Annotation(domain="sound", task="scene", label="metro_station"),
    "sound_present": Annotation(domain="sound", task="sound_present", label="dog"),
    "music_caption": Annotation(text="a slow tune", domain="music", task="caption"),
    "music_class": Annotation(domain="music", task="class", label="jazz"),
    "genre": Annotation(domain="music", task="genre", label="jazz"),
    "instrument": Annotation(domain="music", task="instrument", label="piano"),
    "music_tags": Annotation(domain="music", task="tag", label=["slow", "piano"]),
    "pitch": Annotation(domain="music", task="pitch", label="a4"),
    "tempo": Annotation(domain="music", task="tempo", extra={"beats_per_minute": 120}),
    "key": Annotation(domain="music", task="key", extra={"key": "c minor"}),
    "open_question": Annotation(extra={"question": "How many dogs?", "reply": "two"}),
    "yes_no_question": Annotation(extra={"question": "Is it raining?", "yes_or_no": "no"}),
}


@pytest.fixture(scope="module")
def shipped() -> Instructions:
    _, options = check_decoder(load_settings(REPOSITORY / "conf" / "uniwhisper.yaml").decoder)
    return Instructions(options.instructions)


def test_every_shipped_task_serves_a_sample_of_its_kind(shipped: Instructions):
    assert set(SAMPLES) == set(shipped.entries)
    for name, annotation in SAMPLES.items():
        assert name in shipped.answers(annotation, annotation.domain), name
        question = shipped.only([name]).draw(annotation, annotation.domain, 0)
        assert question.task == name
        assert question.prompt
        assert "{" not in question.prompt + question.answer
        assert (
            len(shipped.entries[name].prompts) >= 2 or name == "open_question"
        )  # whose instruction is the sample's own


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("sound_class", "vacuum cleaner"),
        ("sound_events", "dog, rain"),
        ("language", "German"),
        ("tempo", "120"),
        ("intent", "lights off"),
    ],
)
def test_labels_become_natural_answers_and_lists_have_one_order(
    shipped: Instructions, name: str, answer: str
):
    assert shipped.only([name]).draw(SAMPLES[name], SAMPLES[name].domain, 3).answer == answer


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("he", "Hebrew"),
        ("jw", "Javanese"),
        ("ab", "Abkhazian"),
        ("war", "Waray"),
        ("gv", "Manx"),
        ("sco", "Scots"),
    ],
)
def test_every_language_of_voxlingua_can_be_named(shipped: Instructions, code: str, name: str):
    assert (
        shipped.draw(
            Annotation(domain="speech", task="language", language=code), "speech", 0
        ).answer
        == name
    )


def test_the_order_of_labels_and_repeats_do_not_matter(shipped: Instructions):
    one, other = (
        Annotation(domain="sound", task="tag", label=label)
        for label in (["b", "a", "b"], ["a", "b"])
    )
    assert shipped.draw(one, "sound", 1).answer in ("a, b", "yes", "no")
    tags = shipped.only(["sound_events"])
    assert tags.draw(one, "sound", 1) == tags.draw(other, "sound", 1)


def test_draws_repeat_by_position_and_differ_between_positions():
    entries = {
        "a": Instruction(["one", "two", "three"], weight=3),
        "b": Instruction(["four"], weight=1),
    }
    instructions = Instructions(entries)
    annotation = Annotation(text="x", id="7")
    drawn = [instructions.draw(annotation, "sound", position) for position in range(400)]
    assert drawn == [
        Instructions(entries).draw(annotation, "sound", position) for position in range(400)
    ]
    tasks = Counter(question.task for question in drawn)
    assert 260 <= tasks["a"] <= 340  # 300 expected, standard deviation 8.7
    assert set(Counter(question.prompt for question in drawn)) == {"one", "two", "three", "four"}


def test_a_sample_with_its_own_instruction_and_answer_is_used_as_it_is(shipped: Instructions):
    annotation = Annotation(
        text="x", domain="sound", instruction=" How many dogs {bark}? ", answer="two"
    )
    question = shipped.draw(annotation, "sound", 0)
    assert (question.task, question.prompt, question.answer) == (
        OWN_TASK,
        "How many dogs {bark}?",
        "two",
    )


def test_yes_no_tasks_ask_about_the_class_or_another_one():
    instructions = Instructions(
        {"present": Instruction(["{candidate}?"], "{label:words}", others=["rain", "dog"])}
    )
    annotation = Annotation(label="dog")
    drawn = Counter(
        (q.prompt, q.answer)
        for q in (instructions.draw(annotation, "sound", p) for p in range(200))
    )
    assert set(drawn) == {("dog?", "yes"), ("rain?", "no")}
    assert all(70 <= count <= 130 for count in drawn.values())


@pytest.mark.parametrize(
    ("label", "others", "asked"),
    [
        ("sea_waves", ["waves"], set()),
        ("clock_tick", ["clock"], set()),
        (["Bird", "Crackling_fire"], ["birds", "fire"], set()),
        ("train", ["rain"], {"rain"}),
        ("fireworks", ["fire"], {"fire"}),
        ("bus", ["bu"], {"bu"}),
    ],
)
def test_a_sound_that_a_label_names_is_never_answered_with_no(
    label: str | list[str], others: list[str], asked: set[str]
):
    instructions = Instructions(
        {"present": Instruction(["{candidate}"], "{label:words}", others=[*others, "siren"])}
    )
    drawn = [
        instructions.draw(Annotation(label=label), "sound", position) for position in range(100)
    ]
    assert {question.prompt for question in drawn if question.answer == "no"} == {*asked, "siren"}


def test_what_can_be_answered_does_not_depend_on_the_question(shipped: Instructions):
    annotation = Annotation(text="a dog barks", domain="sound", task="caption", label="dog")
    assert shipped.answers(annotation, "sound") == {
        "audio_caption": "a dog barks",
        "sound_class": "dog",
        "sound_present": "dog",
    }


def test_a_sample_that_serves_no_task_is_refused(shipped: Instructions):
    with pytest.raises(SkipSample) as refused:
        shipped.draw(Annotation(domain="music", task="lyrics"), "music", 0)
    assert refused.value.reason == SkipReason.NO_TASK
    assert "lyrics" in refused.value.detail


def test_all_problems_of_entries_are_named_at_once():
    entries = {
        "empty": Instruction([]),
        "broken": Instruction(["x"], "{text"),
        "format": Instruction(["x"], "{text!r}"),
        "candidate": Instruction(["{candidate}?"]),
        "place": Instruction(["x"], weight=-1),
    }
    with pytest.raises(UserError) as error:
        Instructions(entries)
    for part in (
        "empty.prompts",
        "broken.answer",
        "format.answer",
        "candidate: a yes/no task",
        "-1 is negative",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match="no task at all"):
        Instructions({})
    with pytest.raises(UserError, match="Did you mean 'key'"):
        Instructions({"key": Instruction(["x"])}).only(["keys"])
