"""Probing: a sweep of settings over inner folds, and ESC-10 from audio to score.

Needs `--data FOLDER` with `esc10/` (its CSV and `audio/`) for `esc10 end to end`, which is left out
without it.

- `sweep`: one test fold of 2,000 x 1,280 embeddings of 50 classes. Eight settings are compared on
  four inner folds and the best is fitted again: 33 fits on the same clips by every side. Ours, a
  plain Adam loop over tensors in memory and scikit-learn run in turn. scikit-learn's default
  tolerance stops before the optimum of small penalties; `converged` goes on to where ours stops,
  and its accuracy must agree. X-ARES's trainer (where the package is installed) reads a tar of
  embeddings in every epoch and takes minutes for 33 trainings, so one is timed and counted 33
  times.
- `esc10 end to end`: the other side is Hugging Face's WhisperModel on clips padded to 30 s, its
  frames pooled over the padding as X-ARES pools them, and that trainer, once a fold; ours chooses
  on inner folds. Same random weights of whisper-tiny's shape. Most of the ratio is the padding and
  the tars: see `sweep` for a careful other side.
"""

import csv
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xares_peer
from pairs import Row, compare_values, main
from sklearn.linear_model import LogisticRegression
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from whisper_aut.audio.decode import ClipLimits, load_waveform
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.probes.embed import Embeddings, EmbedSettings, TaskEmbedder
from whisper_aut.probes.fit import probe_splits, threads
from whisper_aut.probes.splits import Split, cross_validation
from whisper_aut.probes.tasks import task_from_mapping

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
WIDE_PENALTIES = tuple(10.0**exponent for exponent in range(-3, 5))
RATES = tuple(1e-4 * 2.0**step for step in range(8))  # 0.0001 to 0.0128
FOLDS = 5
SIZES = (2_000, 1_280, 50)  # clips, width, classes
ADAM_EPOCHS, ADAM_BATCH = 10, 32
Arrays = tuple[np.ndarray, np.ndarray]  # features [B, D], classes [B]
Predict = Callable[[np.ndarray], np.ndarray]  # features [B, D] → classes [B]


def cases(runs: int) -> Iterable[Row]:
    yield from _sweep(min(runs, 3))
    if (data := DATA) is not None:
        with tempfile.TemporaryDirectory() as folder:
            whisper, root = _whisper(Path(folder)), _shards(data / "esc10", Path(folder))
            yield compare_values(
                "esc10 end to end",
                lambda: _timed(
                    "ours", lambda: _ours(cross_validation(_embed(whisper, root)), PENALTIES)
                ),
                lambda: _timed(
                    "theirs", lambda: _xares_folds(_embed_padded(whisper, data / "esc10"))
                ),
                unit="s",
                against=f"Hugging Face padded to 30 s + {xares_peer.NAME}",
                runs=1,
            )


def _sweep(runs: int) -> Iterable[Row]:
    """Run all sides in turn, `runs` times; return a row for each other side."""
    one = cross_validation(_synthesised(*SIZES))[0]
    pool, parts, test = _arrays(one.pool), one.parts, _arrays(one.test)
    fits = len(one.valid_parts) * len(RATES) + 1
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: _ours([one], WIDE_PENALTIES),
        "Adam in memory": lambda: _adam_sweep(pool, parts, test),
        "scikit-learn": lambda: _one_by_one(pool, parts, test, WIDE_PENALTIES, _logistic),
        "scikit-learn, converged": lambda: _one_by_one(
            pool, parts, test, WIDE_PENALTIES, partial(_logistic, tolerance=1e-8)
        ),
    }
    against = {
        "Adam in memory": f"nn.Linear on standardised tensors in memory, {ADAM_EPOCHS} epochs "
        f"of Adam in batches of {ADAM_BATCH}, the rate chosen among {len(RATES)}",
        "scikit-learn": f"LogisticRegression, the penalty chosen among {len(WIDE_PENALTIES)}",
        "scikit-learn, converged": "the same with tol=1e-8",
    }
    if xares_peer.installed():
        inner = [
            torch.from_numpy(part)
            for part in (*_chosen(pool, parts != 0), *_chosen(pool, parts == 0))
        ]
        rates = itertools.cycle(RATES[3::2])
        sides["X-ARES"] = lambda: xares_peer.training(
            (inner[0], inner[1]), (inner[2], inner[3]), next(rates)
        )
        against["X-ARES"] = f"{xares_peer.NAME}, 1 training timed and counted {fits} times"
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    scores: dict[str, float] = {}
    for _ in range(runs):
        for side, run in sides.items():
            start = time.perf_counter()
            scores[side] = run()
            spent = (time.perf_counter() - start) * (fits if side == "X-ARES" else 1)
            seconds[side].append(spent)
            print(f"{side}: accuracy {scores[side]:.4f} in {spent:.1f} s")
    assert abs(scores["ours"] - scores["scikit-learn, converged"]) < 0.01, scores
    median = {side: statistics.median(spent) for side, spent in seconds.items()}
    for side, what in against.items():
        yield Row(
            f"sweep, one fold, {fits} fits: {side}",
            median["ours"],
            median[side],
            "s",
            median[side] / median["ours"],
            runs,
            f"{what}; accuracy {scores['ours']:.3f} here, {scores[side]:.3f} there; "
            "2,000 x 1,280, 50 classes",
        )


def _timed(side: str, run: Callable[[], float]) -> float:
    start = time.perf_counter()
    score = run()
    seconds = time.perf_counter() - start
    print(f"{side}: accuracy {score:.4f} in {seconds:.1f} s")
    return seconds


def _xares_folds(folds: list[Embeddings]) -> float:
    names = sorted(set(folds[0].labels))
    sides = [
        (part.features, torch.tensor([names.index(label) for label in part.labels]))
        for part in folds
    ]
    scores = []
    for number, test in enumerate(sides):
        features, answers = zip(
            *(side for other, side in enumerate(sides) if other != number), strict=True
        )
        scores.append(xares_peer.training((torch.cat(features), torch.cat(answers)), test, 1e-3))
    return float(np.mean(scores))


def _ours(splits: list[Split], penalties: tuple[float, ...]) -> float:
    candidates = [{"penalty": penalty} for penalty in penalties]
    found = probe_splits(splits, seeds=(0,), candidates=candidates)
    return float(np.mean([run.scores for run in found]))


def _one_by_one(
    pool: Arrays,
    parts: np.ndarray,
    test: Arrays,
    settings: Sequence[float],
    fit: Callable[[Arrays, float], Predict],
) -> float:
    """Choose a setting on the inner folds, fit it on the pool, and return its test accuracy."""
    mean, deviation = pool[0].mean(0), pool[0].std(0)
    pool, test = ((((part[0] - mean) / deviation), part[1]) for part in (pool, test))
    valid = [
        np.mean(
            [
                _accuracy(fit(_chosen(pool, parts != part), setting), _chosen(pool, parts == part))
                for part in np.unique(parts)
            ]
        )
        for setting in settings
    ]
    return _accuracy(fit(pool, settings[int(np.argmax(valid))]), test)


def _chosen(part: Arrays, mask: np.ndarray) -> Arrays:
    return part[0][mask], part[1][mask]


def _accuracy(predict: Predict, part: Arrays) -> float:
    return float((predict(part[0]) == part[1]).mean())


def _logistic(train: Arrays, penalty: float, tolerance: float = 1e-4) -> Predict:
    return LogisticRegression(C=1 / penalty, max_iter=1_000, tol=tolerance).fit(*train).predict


def _adam_sweep(pool: Arrays, parts: np.ndarray, test: Arrays) -> float:
    with threads(1):  # steps this small only get slower on more
        return _one_by_one(pool, parts, test, RATES, _adam)


def _adam(train: Arrays, rate: float) -> Predict:
    """A loop that a careful user would write: everything in memory, whole batches by index."""
    torch.manual_seed(0)
    features, answers = (torch.from_numpy(part) for part in train)
    model = torch.nn.Linear(features.shape[1], int(answers.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    for _ in range(ADAM_EPOCHS):
        for batch in torch.randperm(len(answers)).split(ADAM_BATCH):
            loss = torch.nn.functional.cross_entropy(model(features[batch]), answers[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda tested: model(torch.from_numpy(tested)).argmax(1).numpy()


def _arrays(part: Embeddings) -> Arrays:
    names = sorted(set(part.labels))
    return part.features.numpy(), np.array([names.index(label) for label in part.labels])


def _synthesised(clips: int, width: int, classes: int) -> list[Embeddings]:
    """Overlapping clusters whose axes fade as those of real embeddings do."""
    world = torch.Generator().manual_seed(0)
    fading = torch.arange(1, width + 1) ** -0.5
    centres, rotation = (
        torch.randn(classes, width, generator=world),
        torch.linalg.qr(torch.randn(width, width, generator=world))[0],
    )
    labels = torch.arange(clips // FOLDS) % classes
    folds = []
    for number in range(FOLDS):
        noise = 4 * torch.randn(
            len(labels), width, generator=torch.Generator().manual_seed(number + 1)
        )
        keys = tuple(f"{number}:{i}" for i in range(len(labels)))
        features = ((centres[labels] + noise) * fading) @ rotation
        folds.append(Embeddings(features, tuple(map(str, labels.tolist())), keys, {}))
    return folds


def _whisper(folder: Path) -> Path:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=384,
        encoder_layers=4,
        decoder_layers=1,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
    )
    WhisperModel(config).save_pretrained(folder / "whisper")
    return folder / "whisper"


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "esc10.csv").open() as file:
        return list(csv.DictReader(file))


def _shards(folder: Path, out: Path) -> Path:
    for fold in "12345":
        with ShardWriter(out / "shards" / fold) as shards:
            for row in (row for row in _rows(folder) if row["fold"] == fold):
                audio = folder / "audio" / row["filename"]
                shards.write(
                    audio.stem,
                    audio.suffix[1:],
                    audio.read_bytes(),
                    Annotation(label=row["category"]),
                )
    return out / "shards"


def _embed(whisper: Path, root: Path) -> list[Embeddings]:
    folds = {"scheme": "folds", "folds": [f"{{root}}/{fold}" for fold in "12345"]}
    task = task_from_mapping(
        {"name": "esc10", "title": "ESC-10", "domain": "sound", "split": folds}, "benchmark"
    )
    with tempfile.TemporaryDirectory() as cache:  # nothing is taken from an earlier run
        encoder, quiet = load_encoder(str(whisper)), EmbedSettings(quiet=True)
        return list(TaskEmbedder(encoder, task, root, cache, quiet).embed().values())


@torch.inference_mode()
def _embed_padded(whisper: Path, folder: Path) -> list[Embeddings]:
    encoder, extract = (
        WhisperModel.from_pretrained(whisper).encoder.eval(),
        WhisperFeatureExtractor(),
    )
    folds = []
    for fold in "12345":
        rows = [row for row in _rows(folder) if row["fold"] == fold]
        features = []
        for first in range(0, len(rows), 8):
            waves = [
                load_waveform(
                    (folder / "audio" / row["filename"]).read_bytes(), ClipLimits()
                ).numpy()
                for row in rows[first : first + 8]
            ]
            frames = encoder(
                extract(waves, sampling_rate=16_000, return_tensors="pt").input_features
            ).last_hidden_state
            features += list(frames.mean(1))  # silence included, as X-ARES does
        names = tuple(row["filename"] for row in rows)
        folds.append(
            Embeddings(
                torch.stack(features).clone(), tuple(row["category"] for row in rows), names, {}
            )
        )
    return folds


def _take_data() -> Path | None:
    """`--data FOLDER` is this benchmark's own; the rest of the command line is `pairs.main`'s."""
    if "--data" not in sys.argv:
        return None
    place = sys.argv.index("--data")
    folder = Path(sys.argv[place + 1])
    del sys.argv[place : place + 2]
    return folder


if __name__ == "__main__":
    DATA = _take_data()
    main(cases, "Probes: a sweep as one batched problem, compared with one fit after another")
