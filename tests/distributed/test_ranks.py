"""Two CPU ranks under every strategy: the same losses as one rank with the doubled batch, exports,
and going on with other ranks.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.jobs import STEPS, Jobs, assert_close_weights, curve
from whisper_aut.cli import main
from whisper_aut.export.hf import read_checkpoint
from whisper_aut.inference.encoder import load_encoder

STRATEGIES = ("ddp", "fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
TWO_RANKS = ("data.batch_clips=2", "hardware.devices=2", "trainer.accumulate=3")
ONE_RANK = ("data.batch_clips=2", "hardware.devices=1", "trainer.accumulate=6")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["whisper", "causal_lm", "distillation", "padding", "loss", "average", "lora", "fusion"],
)
def test_two_ranks_take_the_steps_of_one(
    kind: str, jobs: Jobs, tiny_language_model: Path, tmp_path: Path, capsys: Any
):
    """Texts and clips differ in length, three micro-batches a step; clipping binds, so a wrong
    scale of the gradient shows.
    """
    chosen = [f"decoder={'causal_lm' if kind in ('causal_lm', 'fusion') else 'whisper'}"]
    if kind == "distillation":
        chosen += ["distillation.weight=2", "distillation.layers=[1, 2]"]
    if kind == "padding":
        chosen += ["model.pad_to_30s=0.3"]
    if kind == "average":
        chosen += ["optim.ema_decay=0.8"]
    if kind == "lora":
        chosen += ["model.lora_rank=4", "optim.lr=1e-2"]
    # ZeRO-3 has no average.
    strategies = [n for n in STRATEGIES if kind != "average" or n != "deepspeed_stage_3"]
    if kind == "loss":
        chosen += ["loss.per=clip", "loss.domains={music: 3}", "distillation.weight=2"]
    if kind == "fusion":
        chosen += ["decoder.adapter.layers=[0, 1, 2]"]
    if kind in ("causal_lm", "fusion"):
        chosen += [f"decoder.language_model={tiny_language_model}", "optim.encoder_after_step=2"]
    single = jobs.add("single", *chosen, "data.batch_clips=4", "trainer.accumulate=3")
    jobs.done(ranks=1)
    runs = {name: jobs.add(name, *chosen, *TWO_RANKS, f"strategy={name}") for name in strategies}
    jobs.done(ranks=2)
    for name, run in runs.items():
        assert curve(run) == pytest.approx(curve(single), abs=1e-4), name
        assert curve(run, "train/grad_norm") == pytest.approx(
            curve(single, "train/grad_norm"), rel=1e-3
        ), name
        assert len(curve(run)) == STEPS
        assert main(["export", str(run.path), "--out", str(tmp_path / f"export-{name}")]) == 0
        exported = load_encoder(str(tmp_path / f"export-{name}")).encoder.state_dict()
        trained = read_checkpoint(run.last_checkpoint)
        assert not any(key.startswith("decoder.model.") for key in trained), (
            "the frozen language model is in the checkpoint"
        )
        for key, weight in exported.items():
            own = next(
                value
                for name, value in trained.items()
                if name.startswith("encoder.") and name.endswith(f".{key}")
            )
            assert torch.equal(weight, own), key
    for name in strategies[1:]:
        assert_close_weights(runs["ddp"], runs[name], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [(TWO_RANKS, ONE_RANK), (ONE_RANK, TWO_RANKS)], ids=["2 to 1", "1 to 2"]
)
def test_a_run_goes_on_with_other_ranks_and_stages(
    first: tuple[str, ...], then: tuple[str, ...], jobs: Jobs
):
    """Ten steps under one strategy, ten under another on other ranks; weights and losses are those
    of a run in one piece.
    """
    pairs = [
        ("ddp", "ddp"),
        ("deepspeed_stage_3", "ddp"),
        ("ddp", "deepspeed_stage_2"),
        ("deepspeed_stage_1", "deepspeed_stage_3"),
        ("fsdp", "deepspeed_stage_2"),
        ("ddp", "fsdp"),
    ]
    whole = jobs.add("whole", *ONE_RANK)
    jobs.done(ranks=1)
    pieces = {}
    for before, after in pairs:
        name = f"{before}-{after}"
        pieces[name] = jobs.add(
            name, *first, f"strategy={before}", "trainer.async_checkpoints=true"
        )
    jobs.done(ranks=2 if first is TWO_RANKS else 1)
    for before, after in pairs:
        name = f"{before}-{after}"
        checkpoint = pieces[name].checkpoints / "step-0000010.ckpt"
        jobs.add(name, *then, f"strategy={after}", resume=str(checkpoint))
    jobs.done(ranks=2 if then is TWO_RANKS else 1)
    for name, run in pieces.items():
        assert curve(run) == pytest.approx(curve(whole), abs=1e-4), name
        assert_close_weights(run, whole, atol=2e-5)


@pytest.mark.slow
def test_refusals_and_bad_clips_are_those_of_all_ranks(
    tmp_path: Path, tiny_whisper: Path, tiny_shards: Path
):
    """Clips of a damaged shard fall to both ranks; the counts go on over a stop, on another number
    of ranks too.
    """
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    damaged = sorted((shards / "speech").glob("*.tar"))[0]
    damaged.write_bytes(damaged.read_bytes()[:700])
    jobs = Jobs(tmp_path, tiny_whisper, shards)
    share = "data.max_skipped_fraction=1"
    whole = jobs.add("whole", share, *ONE_RANK)
    jobs.done(ranks=1)
    poisoned = jobs.add(
        "poisoned", share, *TWO_RANKS, fault={"kind": "poison", "step": 3, "rank": 1}
    )
    parts = jobs.add("parts", share, *TWO_RANKS, fault={"kind": "SIGTERM", "step": 7, "rank": 1})
    assert "Preempted" in jobs.run(ranks=2).stdout
    jobs.add("parts", share, *ONE_RANK, resume="auto")
    jobs.done(ranks=1)
    refused = [json.loads(run.done.read_text())["skipped"] for run in (whole, poisoned, parts)]
    assert refused[0] == refused[1] == refused[2] != {}
    by_rank = [
        [json.loads(line) for line in poisoned.ledger(rank).read_text().splitlines()]
        for rank in (0, 1)
    ]
    reasons = [[line["reason"] for line in lines] for lines in by_rank]
    assert set(reasons[0]) == {"bad tar"}
    assert set(reasons[1]) == {"bad tar", "non-finite loss"}
    written = (reasons[0] + reasons[1]).count("bad tar")
    assert written == sum(sum(counts.values()) for counts in refused[0].values())
