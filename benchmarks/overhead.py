"""What Lightning, the loader, the meters and the logs cost: `training.train` against a bare loop on the same tensors.

The bare loop has its batches in memory, decoded beforehand, and does forward, backward, clipping and the optimiser. A ratio of 0.95
is an overhead of 5 %. Both sides take the time of the steps alone. Where all cores compute, part of it is decoding, which the bare loop
has behind it.
"""

import itertools
import json
import time
from collections.abc import Iterator

import torch
from demo import demo_corpus
from pairs import Row, compare_values, main
from rich.console import Console
from stories import BATCH_CLIPS, small_whisper, story_settings

from whisper_aut.settings import Settings
from whisper_aut.training.build import build_data, build_decoder, build_module, build_start
from whisper_aut.training.train import train

STEPS = 20


def cases(runs: int) -> Iterator[Row]:
    with demo_corpus(scale=0.1) as corpus:
        model = small_whisper(corpus, corpus.parent / "whisper", width=384, layers=4, heads=6)  # as whisper-tiny's
        settings = story_settings(corpus, model, STEPS * BATCH_CLIPS)
        same(last_losses(settings))
        yield compare_values(
            f"{STEPS} steps of {BATCH_CLIPS} demo clips",
            lambda: trained_seconds(settings),
            lambda: bare_seconds(settings),
            unit="s",
            against="a bare loop over the same batches, held in memory",
            runs=runs,
        )


def last_losses(settings: Settings) -> tuple[float, float]:
    """Return the loss of the last step on either side."""
    return trained(settings)["train/loss"], bare(settings)[1]


def same(losses: tuple[float, float]) -> None:
    if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
        raise AssertionError(f"the last step's losses differ: {losses}")


def trained(settings: Settings) -> dict[str, float]:
    run = train(settings, Console(quiet=True), fresh=True).run
    return json.loads(run.done.read_text())["metrics"]


def trained_seconds(settings: Settings) -> float:
    return STEPS * BATCH_CLIPS / trained(settings)["throughput/clips_per_second"]


def bare_seconds(settings: Settings) -> float:
    return bare(settings)[0]


def bare(settings: Settings) -> tuple[float, float]:
    """Train in a plain loop; return its seconds and the loss of its last step."""
    start = build_start(settings)
    decoder, codec = build_decoder(settings, start)
    batches = list(itertools.islice(build_data(settings, codec, start.config.num_mel_bins).train_dataloader(), STEPS))
    module = build_module(settings, start, decoder, codec, STEPS).train()
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    mean = torch.zeros(())
    begun = time.perf_counter()
    for batch in batches:
        _, loss = module(batch)
        optimizer.zero_grad()
        mean = loss.total / sum(loss.counts)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.optim.gradient_clip)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - begun, mean.item()


if __name__ == "__main__":
    main(cases, "Lightning, loader, meters and logs beside a bare loop")
