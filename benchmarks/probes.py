"""Probing: all folds, seeds and penalties as one batched problem, and ESC-10 from audio to score.

In: nothing for `sweep`; `--data FOLDER` with `esc10/` (its CSV and `audio/`) for `esc10 end to end`, which is left out without it.
Out: rows, see `pairs`. The sweep runs the same fits on both sides, ours and scikit-learn's LogisticRegression one after another, and
both choose and refit by the same rule; their mean test scores must agree. End to end, the other side is the usual script: Hugging
Face's WhisperModel on clips padded to 30 s, the mean of the frames that hold the clip, and the same sweep by scikit-learn; both have
the same random weights of whisper-tiny's shape.
"""

import csv
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pairs import Row, compare, main
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
from whisper_aut.probes.rounds import draw, fold_rounds
from whisper_aut.probes.tasks import task_from_mapping

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
SEEDS = (0, 1, 2)
FOLDS, CLIPS, WIDTH, CLASSES = 5, 1_000, 256, 20


def cases(runs: int) -> Iterable[Row]:
    rounds_at = fold_rounds(_synthesised())
    fits = FOLDS * len(SEEDS) * ((FOLDS - 1) * len(PENALTIES) + 1)
    yield compare(
        f"sweep, {fits} fits, {CLIPS} x {WIDTH}",
        lambda: _ours(rounds_at),
        lambda: _theirs(rounds_at),
        against="scikit-learn LogisticRegression, one after another",
        check=_agree,
        runs=min(runs, 3),
    )
    if DATA is not None:
        with tempfile.TemporaryDirectory() as folder:
            whisper, root = _whisper(Path(folder)), _shards(DATA / "esc10", Path(folder))
            yield compare(
                "esc10 end to end",
                lambda: _ours(fold_rounds(_embed(whisper, root))),
                lambda: _theirs(fold_rounds(_embed_padded(whisper, DATA / "esc10"))),
                against="Hugging Face padded to 30 s + scikit-learn",
                check=_print_both,
                runs=1,
            )


def _ours(rounds_at) -> float:
    found = probe_rounds(rounds_at, seeds=SEEDS, candidates=[{"penalty": penalty} for penalty in PENALTIES])
    return float(np.mean([run.scores for run in found]))


def _theirs(rounds_at) -> float:
    scores = []
    for one in rounds_at:
        labels = np.array(one.pool.labels)
        mean, deviation = one.pool.features.mean(0), one.pool.features.std(0, correction=0)
        features, tested = (((part.features - mean) / deviation).numpy() for part in (one.pool, one.test))
        for seed in SEEDS:
            drawn = draw(one, np.unique(labels, return_inverse=True)[1], seed)
            valid = [
                np.mean([_fit(features[f], labels[f], penalty).score(features[v], labels[v]) for f, v in drawn.trials])
                for penalty in PENALTIES
            ]
            best = _fit(features[drawn.final], labels[drawn.final], PENALTIES[int(np.argmax(valid))])
            scores.append(best.score(tested, np.array(one.test.labels)))
    return float(np.mean(scores))


def _fit(features: np.ndarray, labels: np.ndarray, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=1 / penalty, max_iter=1_000).fit(features, labels)


def _agree(ours: float, theirs: float) -> None:
    _print_both(ours, theirs)
    assert abs(ours - theirs) < 0.01, (ours, theirs)


def _print_both(ours: float, theirs: float) -> None:
    print(f"mean accuracy: ours {ours:.4f}, theirs {theirs:.4f}")


def _synthesised() -> list[Embeddings]:
    world = torch.Generator().manual_seed(0)
    centres, mixing = torch.randn(CLASSES, WIDTH, generator=world), torch.randn(WIDTH, WIDTH, generator=world)
    labels = torch.arange(CLIPS // FOLDS) % CLASSES
    folds = []
    for number in range(FOLDS):
        noise = 3 * torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(number + 1))
        features = (centres[labels] + noise) @ mixing
        folds.append(
            Embeddings(features, tuple(map(str, labels.tolist())), tuple(f"{number}:{i}" for i in range(len(labels))), {})
        )
    return folds


def _whisper(folder: Path) -> Path:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=384, encoder_layers=4, decoder_layers=1, encoder_attention_heads=6, decoder_attention_heads=6
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
                shards.write(audio.stem, audio.suffix[1:], audio.read_bytes(), Annotation(label=row["category"]))
    return out / "shards"


def _embed(whisper: Path, root: Path) -> list[Embeddings]:
    folds = {"scheme": "folds", "folds": [f"{{root}}/{fold}" for fold in "12345"]}
    task = task_from_mapping({"name": "esc10", "title": "ESC-10", "domain": "sound", "split": folds}, "benchmark")
    with tempfile.TemporaryDirectory() as cache:  # nothing is taken from an earlier run
        return list(embed_task(load_encoder(str(whisper)), task, root, cache, EmbedSettings(quiet=True)).values())


@torch.inference_mode()
def _embed_padded(whisper: Path, folder: Path) -> list[Embeddings]:
    encoder, extract = WhisperModel.from_pretrained(whisper).encoder.eval(), WhisperFeatureExtractor()
    folds = []
    for fold in "12345":
        rows = [row for row in _rows(folder) if row["fold"] == fold]
        features = []
        for first in range(0, len(rows), 8):
            waves = [
                load_waveform((folder / "audio" / row["filename"]).read_bytes(), ClipLimits()).numpy()
                for row in rows[first : first + 8]
            ]
            frames = encoder(extract(waves, sampling_rate=16_000, return_tensors="pt").input_features).last_hidden_state
            features += [clip[: -(-len(wave) // 320)].mean(0) for clip, wave in zip(frames, waves, strict=True)]
        names = tuple(row["filename"] for row in rows)
        folds.append(Embeddings(torch.stack(features).clone(), tuple(row["category"] for row in rows), names, {}))
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
