"""Compare linear and kNN probes with scikit-learn on the embeddings of a real encoder.

    python benchmarks/field/agreement.py MODEL@none --root data/field --cache runs/field_embeddings

Fits each test part of the tasks with several penalties, and neighbours with the default setting.
Prints for each probe the accuracies over all test clips, and the largest difference of the test
loss and of any probability over test parts. Fails if accuracies differ by more than 0.5 points,
losses of linear probes by 1e-3, or probabilities of neighbours by 1e-4.
"""

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from whisper_aut.loading import load_tasks, open_encoder
from whisper_aut.probes.datamodule import ClassDataModule
from whisper_aut.probes.embed import EmbedSettings, TaskEmbedder
from whisper_aut.probes.fit import train_heads
from whisper_aut.probes.modules import Candidate, KNNProbe, LinearProbe, Probe
from whisper_aut.probes.splits import Split, splits_of

PENALTIES = (1.0, 100.0)
# Test clips, right ones of ours and theirs, differences of the loss and of any probability.
Compared = tuple[int, int, int, float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare probes with scikit-learn.")
    parser.add_argument("encoder", help="as for `whisper-aut probe`")
    parser.add_argument("--root", type=Path, default=Path("data/field"))
    parser.add_argument("--cache", type=Path, default=Path("runs/field_embeddings"))
    parser.add_argument("--tasks", nargs="+", default=["esc10_5fold", "gmnotes", "fsdd"])
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    encoder = open_encoder(options.encoder, None)
    print("| task | probe | ours | scikit-learn | test loss | probability |")
    print("|:---|:---|---:|---:|---:|---:|")
    for task in load_tasks(options.tasks, Path("conf")):
        quiet = EmbedSettings(quiet=True)
        embedded = TaskEmbedder(encoder, task, options.root, options.cache, quiet).embed()
        splits = splits_of(embedded, task)
        compared = {
            f"linear, penalty {penalty:g}": linear(splits, penalty) for penalty in PENALTIES
        }
        for name, found in (compared | {"kNN": neighbours(splits)}).items():
            clips, ours, theirs, losses, probabilities = zip(*found, strict=True)
            scores = [100 * sum(right) / sum(clips) for right in (ours, theirs)]
            knn = name == "kNN"  # its zeros have infinite losses
            loss, most = "–" if knn else f"{max(losses):.1g}", max(probabilities)
            cells = f"{scores[0]:.1f} | {scores[1]:.1f} | {loss} | {most:.1g}"
            print(f"| {task.name} | {name} | {cells} |", flush=True)
            assert abs(scores[0] - scores[1]) <= 0.5
            assert most <= 1e-4 if knn else max(losses) <= 1e-3


def linear(splits: Sequence[Split], penalty: float) -> Iterator[Compared]:
    for split in splits:
        train, labels, test = arrays(split)
        scaler = StandardScaler().fit(train)
        model = LogisticRegression(C=1 / penalty, tol=1e-6, max_iter=5_000)
        model.fit(scaler.transform(train), labels)
        theirs = model.predict_proba(scaler.transform(test))
        yield compare(split, LinearProbe, {"penalty": penalty}, theirs)


def neighbours(splits: Sequence[Split]) -> Iterator[Compared]:
    setting = KNNProbe.default

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / setting["temperature"])

    for split in splits:
        train, labels, test = arrays(split)
        options: Any = {"metric": "cosine", "weights": weights}
        model = KNeighborsClassifier(int(setting["k"]), **options)
        theirs = model.fit(train, labels).predict_proba(test)
        yield compare(split, KNNProbe, setting, theirs)


def arrays(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return training features and labels, and test features."""
    features = (split.pool.features[split.train], split.test.features)
    train, test = (part.double().numpy() for part in features)
    return train, np.array(split.pool.labels)[split.train], test


def compare(split: Split, kind: type[Probe], setting: Candidate, theirs: np.ndarray) -> Compared:
    """Return the test clips, those that our and their probe classify correctly, and the
    differences of the test loss and of any probability.
    """
    data = ClassDataModule(split, kind)
    data.assign([split.train])
    heads = kind.for_data(data, [setting])
    train_heads(heads, data).test(heads, data, verbose=False)
    ours = heads.results[0].outputs.double().softmax(1).numpy()
    labels, classes = np.array(split.test.labels), np.array(data.classes)
    mine, others = (int((classes[p.argmax(1)] == labels).sum()) for p in (ours, theirs))
    loss, other = (log_loss(labels, p, labels=classes) for p in (ours, theirs))
    return len(labels), mine, others, abs(loss - other), float(np.abs(ours - theirs).max())


if __name__ == "__main__":
    main()
