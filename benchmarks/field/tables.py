"""Write the tables of the field suite from the scores in docs/results/field.

    python benchmarks/field/tables.py docs/results/field --baseline whisper-base@30s > table.md

Each folder holds one encoder's scores, written by `score.py`. Folders called NAME-0, NAME-1 … are
trainings of one recipe with different seeds. They are shown as a mean with the 95 % t interval over
trainings, and compared with the baseline's score by a t test in which the training is the unit.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats
from score import KINDS

from whisper_aut.probes.results import Scores
from whisper_aut.probes.stats import MIN_TRAININGS, holm
from whisper_aut.utils import read_json

TRANSFER = ("keywords", "tuxpaint", "fsdd", "esc10_5fold", "instruments_5fold")
IN_DOMAIN = ("us8k_fold10", "gmnotes")
PRIMARY = {"whisper-base@30s": "linear esc10_5fold"}  # by baseline, named before training
WER = {"WER kerstin (German)": "kerstin", "WER kathleen (English)": "kathleen"}


def read_encoder(folder: Path) -> dict[str, float]:
    """Return all values of one encoder in percent, by the names of the tables' rows."""
    values: dict[str, float] = {}
    texts = read_json(folder / "texts.json", default={})
    recognized = [
        (found["clips"], max(0.0, 1 - found["wer_transcription"])) for found in texts.values()
    ]
    for kind in KINDS:
        path = folder / f"{kind}.json"
        entries = Scores.load(path).entries if path.is_file() else ()
        scores = {entry.task: (entry.weight, entry.mean) for entry in entries}
        for task, (_, score) in scores.items():
            values[f"{kind} {task}"] = 100 * score
        if set(scores) != {*TRANSFER, *IN_DOMAIN}:
            continue  # averages need all tasks
        for label, tasks in (("transfer", TRANSFER), ("in-domain", IN_DOMAIN)):
            values[f"{kind} {label}"] = 100 * weighted_mean([scores[task] for task in tasks])
        pairs = list(scores.values())
        values[f"{kind} average"] = 100 * weighted_mean(pairs)
        if len(recognized) == len(WER):
            values[f"{kind} average with ASR"] = 100 * weighted_mean([*pairs, *recognized])
    for row, corpus in WER.items():
        if corpus in texts:
            values[row] = 100 * texts[corpus]["wer_transcription"]
    return values


def weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    weights, values = zip(*pairs, strict=True)
    return float(np.average(values, weights=weights))


def half_width(values: np.ndarray) -> float:
    """Return half of the 95 % t interval of the mean."""
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def compare(
    rows: Sequence[str], runs: Sequence[dict[str, float]], base: dict[str, float], primary: str
) -> None:
    """Print how a recipe differs from the baseline, the primary comparison first.

    p-values, of a t test and corrected by Holm except for the primary one, need `MIN_TRAININGS`.
    """
    rows = [row for row in rows if row in base and all(row in run for run in runs)]
    rows.sort(key=lambda row: row != primary)
    changes = {row: np.array([run[row] - base[row] for run in runs]) for row in rows}
    p_values = dict.fromkeys(rows, float("nan"))
    if len(runs) >= MIN_TRAININGS:
        p_values = {row: float(stats.ttest_1samp(changes[row], 0.0).pvalue) for row in rows}  # pyright: ignore
        others = [row for row in rows if row != primary]
        p_values |= zip(others, holm([p_values[row] for row in others]), strict=True)
    print("| | change | 95 % interval | p |\n|:---|---:|---:|---:|")
    for row in rows:
        mean, width = changes[row].mean(), half_width(changes[row])
        p_value = f"{p_values[row]:.2g}" if np.isfinite(p_values[row]) else "–"
        p_value = p_value if len(runs) >= MIN_TRAININGS else "no claim"
        shown = f"{p_value} (primary)" if row == primary else p_value
        print(f"| {row} | {mean:+.1f} | {mean - width:+.1f} … {mean + width:+.1f} | {shown} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of the field suite.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", default="whisper-base@30s")
    options = parser.parse_args()
    recipes: dict[str, list[dict[str, float]]] = {}
    for folder in sorted(path for path in options.folder.iterdir() if path.is_dir()):
        recipes.setdefault(re.sub(r"-\d+$", "", folder.name), []).append(read_encoder(folder))
    rows = list(dict.fromkeys(row for runs in recipes.values() for run in runs for row in run))
    counts = (f" (n = {len(runs)})" if len(runs) > 1 else "" for runs in recipes.values())
    heads = [f"{name}{count}" for name, count in zip(recipes, counts, strict=True)]
    print(f"| | {' | '.join(heads)} |\n|:---|{'---:|' * len(heads)}")
    for row in rows:
        cells = []
        for runs in recipes.values():
            values = np.array([run[row] for run in runs if row in run])
            cell = f"{values.mean():.1f}" if len(values) else "–"
            cells.append(f"{cell} ± {half_width(values):.1f}" if len(values) > 1 else cell)
        print(f"| {row} | {' | '.join(cells)} |")
    for name, runs in recipes.items():
        if len(runs) > 1:
            print(f"\n{name} against {options.baseline}, {len(runs)} trainings:\n")
            primary = PRIMARY.get(options.baseline, "")
            compare(rows, runs, recipes[options.baseline][0], primary)


if __name__ == "__main__":
    main()
