"""Score an encoder on the field suite: three kinds of probes, and the texts of its decoder.

    python benchmarks/field/score.py ENCODER --root data/field --out docs/results/field/NAME
    python benchmarks/field/score.py RUN/export/encoder --generator RUN …

Writes `linear.json`, `mlp.json` and `knn.json`, as `whisper-aut probe` does, and with a generator
`texts.json`: word and character error rates of German (kerstin: all clips, since no run trains on
it) and English (kathleen: test clips). Stopped runs resume. Embeddings are cached in `--cache`.
"""

import argparse
import time
from pathlib import Path

from whisper_aut.inference.chat import evaluate
from whisper_aut.loading import load_tasks, open_encoder, open_generator
from whisper_aut.probes.embed import EmbedSettings
from whisper_aut.probes.suite import run_suite
from whisper_aut.utils import read_json, write_json

KINDS = ("linear", "knn", "mlp")
TEXTS = {"kerstin": ("train", "valid", "test"), "kathleen": ("test",)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Score an encoder on the field suite.")
    parser.add_argument("encoder", help="as for `whisper-aut probe`, such as NAME@30s or logmel")
    parser.add_argument("--generator", help="a run or a Whisper, as for `whisper-aut evaluate`")
    parser.add_argument("--root", type=Path, default=Path("data/field"))
    parser.add_argument("--cache", type=Path, default=Path("runs/field_embeddings"))
    parser.add_argument("--tasks", nargs="+", default=["field"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path, required=True, help="its name is the encoder's")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    if options.generator:
        write_texts(options.generator, options.root, options.out / "texts.json")
    encoder = open_encoder(options.encoder, None)
    for kind in options.kinds:
        start = time.perf_counter()
        scores = run_suite(
            {options.out.name: encoder},
            load_tasks(options.tasks, Path("conf")),
            root=options.root,
            cache=options.cache,
            kind=kind,
            embedding=EmbedSettings(quiet=True),
            scores_file=options.out / f"{kind}.json",
        )
        found = "  ".join(f"{entry.task} {100 * entry.mean:.1f}" for entry in scores.entries)
        print(f"{options.out.name} {kind}: {found}  ({time.perf_counter() - start:.0f} s)")


def write_texts(generator: str, root: Path, out: Path) -> None:
    """Generate the texts of the corpora in `TEXTS`, and write their error rates."""
    found = read_json(out, default={})
    module = None
    for corpus, parts in TEXTS.items():
        if corpus in found:
            continue
        module = module or open_generator(generator)
        result = evaluate(module, [str(root / corpus / part) for part in parts], domain="speech")
        found[corpus] = result.metrics | {"clips": result.clips, "cut": result.cut}
        write_json(out, found)
        print(f"{corpus}: {found[corpus]}")


if __name__ == "__main__":
    main()
