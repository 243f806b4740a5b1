"""Probing: seeds, inner folds and settings as one batched problem, and ESC-10 from audio to score.

In: nothing for the sweeps; `--data FOLDER` with `esc10/` (its CSV and `audio/`) for `esc10 end to end`, which is left out without it.
Out: rows, see `pairs`.

- `sweep`: one test fold of 2,000 x 1,280 embeddings of 50 classes, 5 seeds, 8 settings, nested: 165 fits. The other side is one training
  of X-ARES's kind a seed and setting (40), see `xares_peer`: ten epochs of Adam on a linear layer behind a LayerNorm, batches of 32,
  scored after every epoch on the fold that is reported. One of them, of another rate in every run, is timed and counted 40 times.
- `sweep beside scikit-learn`: the same fits on both sides, LogisticRegression one after another; mean test scores must agree.
- `esc10 end to end`: the other side is Hugging Face's WhisperModel on clips padded to 30 s, its frames pooled over the padding as X-ARES
  pools them, and that trainer, once a fold; ours chooses on inner folds. Same random weights of whisper-tiny's shape.
"""

import csv
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import xares_peer
from pairs import Row, compare, compare_values, main
from sklearn.linear_model import LogisticRegression
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.shards import ShardFolder
from whisper_aut.data.waveform import load_waveform
from whisper_aut.model.pretrained import load_encoder
from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.embed import EmbedSettings, embed_task
from whisper_aut.probes.kinds import probe_rounds
from whisper_aut.probes.rounds import Round, draw, fold_rounds
from whisper_aut.probes.tasks import task_from_mapping

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
SEEDS = (0, 1, 2)
WIDE_PENALTIES = tuple(10.0**exponent for exponent in range(-3, 5))
WIDE_SEEDS = (0, 1, 2, 3, 4)
RATES = tuple(1e-4 * 2.0**step for step in range(8))  # 0.0001 to 0.0128
FOLDS = 5


def cases(runs: int) -> Iterable[Row]:
    yield _sweep(min(runs, 3))
    rounds_at = fold_rounds(_synthesised(500, 128, 10))[:2]
    fits = len(rounds_at) * len(SEEDS) * ((FOLDS - 1) * len(PENALTIES) + 1)
    yield compare(
        f"sweep beside scikit-learn, {fits} fits",
        lambda: _ours(rounds_at, SEEDS, PENALTIES),
        lambda: _theirs(rounds_at),
        against="scikit-learn LogisticRegression, one after another, 500 x 128, 10 classes",
        check=_agree,
        runs=min(runs, 3),
    )
    if (data := DATA) is not None:
        with tempfile.TemporaryDirectory() as folder:
            whisper, root = _whisper(Path(folder)), _shards(data / "esc10", Path(folder))
            yield compare_values(
                "esc10 end to end",
                lambda: _timed(
                    "ours", lambda: _ours(fold_rounds(_embed(whisper, root)), (0,), PENALTIES)
                ),
                lambda: _timed(
                    "theirs", lambda: _xares_folds(_embed_padded(whisper, data / "esc10"))
                ),
                unit="s",
                against=f"Hugging Face padded to 30 s + {xares_peer.NAME}",
                runs=1,
            )


def _sweep(runs: int) -> Row:
    one = fold_rounds(_synthesised(2_000, 1_280, 50))[0]
    names = sorted(set(one.pool.labels))
    pool, test = (
        (part.features, torch.tensor([names.index(label) for label in part.labels]))
        for part in (one.pool, one.test)
    )
    rates, trainings = itertools.cycle(RATES[3::2]), len(WIDE_SEEDS) * len(RATES)
    return compare_values(
        "sweep, one fold, 5 seeds x 8 settings",
        lambda: _timed("ours", lambda: _ours([one], WIDE_SEEDS, WIDE_PENALTIES)),
        lambda: (
            trainings * _timed("theirs, once", lambda: xares_peer.training(pool, test, next(rates)))
        ),
        unit="s",
        against=f"{xares_peer.NAME}, 1 training timed and counted {trainings} times, 2,000 x 1,280, 50 classes",
        runs=runs,
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


def _ours(rounds_at: list[Round], seeds: tuple[int, ...], penalties: tuple[float, ...]) -> float:
    found = probe_rounds(
        rounds_at, seeds=seeds, candidates=[{"penalty": penalty} for penalty in penalties]
    )
    return float(np.mean([run.scores for run in found]))


def _theirs(rounds_at: list[Round]) -> float:
    scores = []
    for one in rounds_at:
        labels = np.array(one.pool.labels)
        mean, deviation = one.pool.features.mean(0), one.pool.features.std(0, correction=0)
        features, tested = (
            ((part.features - mean) / deviation).numpy() for part in (one.pool, one.test)
        )
        for seed in SEEDS:
            drawn = draw(one, np.unique(labels, return_inverse=True)[1], seed)
            valid = [
                np.mean(
                    [
                        _fit(features[f], labels[f], penalty).score(features[v], labels[v])
                        for f, v in drawn.trials
                    ]
                )
                for penalty in PENALTIES
            ]
            best = _fit(
                features[drawn.final], labels[drawn.final], PENALTIES[int(np.argmax(valid))]
            )
            scores.append(best.score(tested, np.array(one.test.labels)))
    return float(np.mean(scores))


def _fit(features: np.ndarray, labels: np.ndarray, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=1 / penalty, max_iter=1_000).fit(features, labels)


def _agree(ours: float, theirs: float) -> None:
    print(f"mean accuracy: ours {ours:.4f}, theirs {theirs:.4f}")
    assert abs(ours - theirs) < 0.01, (ours, theirs)


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
        with ShardFolder(out / "shards" / fold) as shards:
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
        return list(
            embed_task(
                load_encoder(str(whisper)), task, root, cache, EmbedSettings(quiet=True)
            ).values()
        )


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
    main(cases, "Probes: our batched problem beside the usual loop")
