"""Scores of two encoders on two tasks."""

import pytest

from whisper_aut.probes.results import Scores, TaskScore


def entry(encoder: str, task: str, domain: str, right: tuple[int, int]) -> TaskScore:
    correct = tuple("1" * count + "0" * (10 - count) for count in right)
    return TaskScore(
        encoder=encoder,
        task=task,
        title=task.title(),
        domain=domain,
        weight=10.0,
        metric="accuracy",
        classes=4,
        scores=tuple(count / 10 for count in right),
        chosen=({"rate": 1e-3, "epochs": 20}, {"rate": 1e-2, "epochs": 10}),
        valid_scores=(0.5, 0.6),
        seeds=(0, 1),
        final_fit="train",
        record=correct,
        units=(10,),
        keys_sha256=task,
        clips={"train": 40, "valid": 10, "test": 10},
        skipped={"train": {"no label": 4}} if task == "bark" else {},
        chance=0.25,
        pooling="mean",
        identity=f"{encoder}-{task}",
        kind="mlp",
    )


@pytest.fixture
def two_encoders() -> Scores:
    entries = (
        entry("ours", "bark", "sound", (8, 7)),
        entry("base", "bark", "sound", (5, 4)),
        entry("ours", "speak", "speech", (9, 9)),
        entry("base", "speak", "speech", (9, 8)),
    )
    return Scores(entries, (), (0, 1))
