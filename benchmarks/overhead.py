"""What Lightning, the loader, the meters and the logs cost: `training.train` against a bare loop on
the same tensors.

The bare loop has its batches in memory, decoded beforehand, and does forward, backward, clipping
and the optimiser. A ratio of 0.95 is an overhead of 5 %. Both sides take the time of the steps
alone, without the checkpoint at the end. The first row has its batches in memory too: it shows
Lightning, meters and logs. In the others decoding and log-mel are part of ours, and the start of
the loader.
"""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
from demo import demo_corpus
from pairs import Row, compare_all, main
from rich.console import Console
from stories import BATCH_CLIPS, small_whisper, story_settings

from whisper_aut.config import Settings
from whisper_aut.data.batch import Batch
from whisper_aut.data.datamodule import TrainLoader
from whisper_aut.report.plots import Series, read_metrics
from whisper_aut.training.factory import build_data, build_decoder, build_module, build_pretrained
from whisper_aut.training.train import train

STEPS = 60
CHECKED_STEPS = 20  # rounding grows from step to step


def cases(runs: int) -> Iterator[Row]:
    with demo_corpus(scale=0.1) as corpus:
        model = small_whisper(
            corpus, corpus.parent / "whisper", width=384, layers=4, heads=6
        )  # as whisper-tiny's
        settings = story_settings(corpus, model, (STEPS + 1) * BATCH_CLIPS)
        settings.trainer.log_every_steps = CHECKED_STEPS
        same(checked_losses(settings))
        settings.trainer.log_every_steps = (
            STEPS  # figures are taken before the last step, which writes a checkpoint
        )
        case, against = (
            f"{STEPS} steps of {BATCH_CLIPS} demo clips",
            "a bare loop over the same batches, held in memory",
        )
        sides = {
            f"{case}, held in memory": partial(held_seconds, settings, decoded(settings)),
            f"{case}, decoded in the same process": partial(trained_seconds, settings, 0),
            f"{case}, decoded by a worker": partial(trained_seconds, settings, 1),
        }
        yield from compare_all(
            sides,
            lambda: bare_seconds(settings),
            unit="s",
            against=dict.fromkeys(sides, against),
            runs=runs,
        )


def checked_losses(settings: Settings) -> tuple[float, float]:
    """Return the loss of step `CHECKED_STEPS` on either side."""
    return trained(settings)["train/loss"][0][1], bare(settings)[1][CHECKED_STEPS - 1]


def same(losses: tuple[float, float]) -> None:
    if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
        raise AssertionError(f"the losses of step {CHECKED_STEPS} differ: {losses}")


def trained(settings: Settings) -> dict[str, Series]:
    run = train(settings, Console(quiet=True), fresh=True).run
    return read_metrics(run.path / "logs" / "metrics.csv")


def held_seconds(settings: Settings, batches: list[Batch]) -> float:
    """Train on batches that are in memory already; the last step is not timed."""
    with mock.patch.object(
        TrainLoader, "__iter__", side_effect=lambda: iter([*batches, batches[0]])
    ):
        return trained_seconds(settings, workers=0)


def trained_seconds(settings: Settings, workers: int) -> float:
    settings.data.workers = workers
    return trained(settings)["throughput/total_seconds"][0][1]


def decoded(settings: Settings) -> list[Batch]:
    start = build_pretrained(settings)
    _, codec = build_decoder(settings, start)
    return list(
        itertools.islice(
            build_data(settings, codec, start.config.num_mel_bins).train_dataloader(), STEPS
        )
    )


def bare_seconds(settings: Settings) -> float:
    return bare(settings)[0]


def bare(settings: Settings) -> tuple[float, list[float]]:
    """Train in a plain loop; return its seconds and the loss of each step."""
    start = build_pretrained(settings)
    decoder, codec = build_decoder(settings, start)
    batches = decoded(settings)
    module = build_module(settings, start, decoder, codec, STEPS + 1).train()
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    losses = []
    begun = time.perf_counter()
    for batch in batches:
        _, loss = module(batch)
        optimizer.zero_grad()
        mean = loss.total / sum(loss.counts)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.optim.gradient_clip)
        optimizer.step()
        schedule.step()
        losses.append(mean.item())
    return time.perf_counter() - begun, losses


if __name__ == "__main__":
    main(cases, "Lightning, loader, meters and logs compared with a bare loop")
