"""Measures of generated text against libraries and hand-made cases."""

from math import isnan, nan

import jiwer
import pytest
import torch

from whisper_aut.models.metrics import AnswerMetrics, LossMetrics, tag_f1


def test_each_task_has_its_measures():
    metrics = AnswerMetrics(
        {"say": "words", "class": "exact", "tags": "tags", "caption": "caption", "unseen": "exact"}
    )
    said = [("turn the light off", "Turn the lights off!"), ("seven", "seven"), ("", "nine birds")]
    for written, meant in said:
        metrics.update("say", written, [meant])
    metrics.update("class", " Vacuum cleaner.", ["vacuum cleaner"])
    metrics.update("class", "dog", ["rain"])
    metrics.update("tags", "rain, dog", ["dog, rain"])
    metrics.update("tags", "dog", ["dog, rain"])
    metrics.update("caption", "a dog barks", ["a dog barks loudly"])
    metrics.update("caption", "rain falls", ["rain falls hard", "it rains", "rain falls", "..."])
    metrics.update("other", "x", ["y"])
    metrics.update("class", "x", ["..."])  # nothing is left of this reference
    computed = {
        f"{name}_{task}": float(value)
        for task, values in metrics.compute().items()
        for name, value in values.items()
    }
    assert computed["wer_say"] == pytest.approx(
        jiwer.wer(["turn the lights off", "seven", "nine birds"], [s for s, _ in said])
    )
    assert computed["cer_say"] == pytest.approx(
        jiwer.cer(["turn the lights off", "seven", "nine birds"], [s for s, _ in said])
    )
    assert computed["exact_class"] == 0.5
    assert computed["f1_tags"] == pytest.approx((1 + 2 / 3) / 2)
    assert computed["exact_tags"] == 0.5
    assert computed["rouge_caption"] == pytest.approx((2 * 1 * 0.75 / 1.75 + 1) / 2)
    assert not any("unseen" in name for name in computed)
    metrics.reset()
    assert metrics.compute() == {}


def test_tag_f1_of_empty_sets():
    assert tag_f1(set(), set()) == 1.0
    assert tag_f1({"a"}, set()) == 0.0


def test_a_loss_that_is_not_a_number_shows_in_the_mean():
    metrics = LossMetrics(["speech", "sound"])
    for group, first in (("speech", nan), ("speech", 1.0), ("sound", 3.0)):
        metrics.update(group, torch.tensor([first, 2.0]), torch.tensor([False, True]))
    found = metrics.compute()
    assert isnan(found["speech"]["loss"])
    assert float(found["sound"]["loss"]) == 2.5
    assert float(found["speech"]["accuracy"]) == 0.5
