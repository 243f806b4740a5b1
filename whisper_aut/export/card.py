"""The model card of an export, written from what the run recorded; what it did not record is said to be unknown.

In: a run directory (config, environment, `done.json`, and where they are there `scores.json` and `audit.json`). Out: `README.md` in the
export, with the front matter that the Hugging Face hub reads. Next: people who consider using the encoder.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from whisper_aut import __version__

CARD = "README.md"
PAPERS = {
    "whisper": "AuT ([arXiv 2604.10438](https://arxiv.org/abs/2604.10438)): encoder and decoder fine-tuned on texts of all domains.",
    "causal_lm": "UniWhisper ([arXiv 2602.21772](https://arxiv.org/abs/2602.21772)): the encoder learns through an adapter and a "
    "language model.",
}
USES = {
    "encoder": 'import whisper_aut\n\nencoder = whisper_aut.load_encoder("{name}")\nframes = encoder.encode(["clip.wav"])',
    "whisper": 'from transformers import pipeline\n\npipeline("automatic-speech-recognition", model="{name}")("clip.wav")',
    "tower": 'from whisper_aut.export.towers import swap_tower\n\nswap_tower(model, "{name}")  # a model that you have loaded',
    "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}/encoder.onnx")\n'
    '(frames,) = session.run(None, {{"waveform": waveform}})  # float32 [S] at 16 kHz',
}


def write_card(run: Path, out: Path, kind: str, dtype: str = "fp32") -> Path:
    """Write the card of an export into it.

    Args:
        run: the run directory that the export was made from.
        kind, dtype: how it was exported.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    facts, done = _json(run / "environment.json"), _json(run / "done.json")
    sections = [
        _front_matter(config, facts, kind),
        f"# {config['name']}\n\n{_opening(config, kind, dtype)}",
        f"## Use\n```python\n{USES.get(kind, USES['tower']).format(name=out.name)}\n```",
        f"## Recipe\n{_recipe(config, facts, done)}",
        f"## Training data\n{_data(config, facts)}",
        f"## Overlap with the probe sets\n{_audit(_json(run / 'audit.json'), facts)}",
        f"## Probes\n{_probes(_json(run / 'scores.json'))}",
        f"## Intended use and limits\n{_limits(config, kind, done)}",
    ]
    path = out / CARD
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _front_matter(config: Mapping[str, Any], facts: Mapping[str, Any], kind: str) -> str:
    values: dict[str, Any] = {
        "library_name": "onnx" if kind == "onnx" else "transformers",
        "pipeline_tag": "automatic-speech-recognition"
        if kind == "whisper"
        else "feature-extraction",
        "tags": ["audio", "whisper", "whisper-aut"],
    }
    if "/" in (start := _start(config)):
        values["base_model"] = start
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _opening(config: Mapping[str, Any], kind: str, dtype: str) -> str:
    what = {
        "encoder": "An audio encoder in Whisper's format, without a decoder.",
        "whisper": "A Whisper encoder with the decoder that was trained beside it.",
        "onnx": "An audio encoder as an ONNX graph: 16 kHz waveform in, frames out.",
    }.get(kind, f"The encoder's weights as the audio tower of {kind}.")
    length = (
        'It was trained on clips at their own length: run it so (`padding="none"`), as `load_encoder` does.'
        if config["model"]["padding"] == "none"
        else 'It was trained on clips padded to 30 s: run it so (`padding="30s"`), as `load_encoder` does.'
    )
    return f"{what} A frame every 20 ms; weights in {dtype}. {length} Made with whisper-aut {__version__}."


def _recipe(config: Mapping[str, Any], facts: Mapping[str, Any], done: Mapping[str, Any]) -> str:
    optim, trainer, decoder = config["optim"], config["trainer"], config["decoder"]
    lines = {
        "recipe": PAPERS.get(decoder["name"], f"decoder `{decoder['name']}`"),
        "started from": _start(config) or "a random initialisation",
        "taught through": facts.get("decoder", {}).get("language_model")
        or decoder.get("language_model")
        or "its own decoder",
        "optimiser": f"AdamW, learning rate {optim['lr']:g}, {optim['schedule']} schedule, {optim['warmup_steps']} warm-up steps, "
        f"weight decay {optim['weight_decay']:g}",
        "steps": f"{done.get('steps', 'unfinished')} of {config['data']['batch_clips'] * trainer['accumulate']} clips a rank",
        "seed, precision": f"{config['seed']}, {config['hardware']['precision']}",
        "code": facts.get("git") or f"whisper-aut {__version__}",
    }
    figures = {
        name: value for name, value in done.get("metrics", {}).items() if name.startswith("valid/")
    }
    if figures:
        lines["validation"] = ", ".join(
            f"{name.removeprefix('valid/')} {value:.4g}" for name, value in sorted(figures.items())
        )
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _data(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    stated = {source["path"]: source.get("licence", "") for source in config["data"]["train"]}
    rows = [
        [
            Path(source["root"]).name,
            source["domain"],
            f"{source['share']:.1%}",
            f"{source['clips']:,}",
            f"{source['seconds'] / 3600:.2f}",
            _licences(source, stated),
        ]
        for source in facts.get("data", [])
    ]
    if not rows:
        return "The run recorded none."
    shares = Counter[str]()
    for source in facts["data"]:
        shares[source["domain"]] += source["share"]
    mixture = ", ".join(f"{share:.0%} {domain}" for domain, share in shares.most_common())
    unknown = sum(
        source["share"] for source in facts["data"] if not _licences(source, stated).strip("–")
    )
    note = f"\n\n{unknown:.0%} of what was trained on states no licence." if unknown else ""
    return f"{mixture}, by clips.\n\n{_table(['source', 'domain', 'share', 'clips', 'hours', 'licence'], rows)}{note}"


def _licences(source: Mapping[str, Any], stated: Mapping[str, str]) -> str:
    listed = [licence for licence in source.get("licences", []) if licence] or [
        stated.get(source["root"], "")
    ]
    return ", ".join(listed) or "–"


def _audit(audit: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    if not audit:
        return "Not audited: whether clips of the probe sets were trained on is unknown."
    counts = "\n".join(
        f"- {name.replace('_', ' ')}: {value}" for name, value in _flat(audit.get("counts", {}))
    )
    excluded = sum(source.get("excluded", 0) for source in facts.get("data", []))
    return f"`whisper-aut data audit` compared the training data with the probe sets:\n{counts}\n- clips left out of training: {excluded}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += (
            _flat(value, f"{prefix}{name} ")
            if isinstance(value, Mapping)
            else [(f"{prefix}{name}", value)]
        )
    return found


def _probes(scores: Mapping[str, Any]) -> str:
    entries = scores.get("entries", [])
    if not entries:
        return "Not probed."
    encoders = list(dict.fromkeys(entry["encoder"] for entry in entries))
    cells = {(entry["task"], entry["encoder"]): _score(entry) for entry in entries}
    titles = {
        entry["task"]: f"{entry['title']} ({entry['metric']}, {entry['kind']})" for entry in entries
    }
    rows = [
        [title, *(cells.get((task, encoder), "–") for encoder in encoders)]
        for task, title in titles.items()
    ]
    labels = _labels(entries)
    table = _table(["in %", *(labels[encoder] for encoder in encoders)], rows)
    seeds = len(scores.get("seeds", []))
    note = (
        f"Protocol `{scores['protocol']}`, {seeds} seeds: mean ± standard deviation over seeds and folds. The frozen encoder's frames "
        "are pooled over each clip's own length."
    )
    return "\n\n".join([table, note, *_differences(scores, titles, labels)])


def _score(entry: Mapping[str, Any]) -> str:
    values = 100 * np.array(entry["scores"])
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def _labels(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what tables call each encoder, as `probes.scores.Scores.label` does."""
    paddings = {entry["encoder"]: entry.get("padding", "") for entry in entries}
    return {
        encoder: encoder
        if encoder.endswith(f"@{padding}") or not padding
        else f"{encoder}@{padding}"
        for encoder, padding in paddings.items()
    }


def _differences(
    scores: Mapping[str, Any], titles: Mapping[str, str], labels: Mapping[str, str]
) -> list[str]:
    lines = []
    for one in scores.get("comparisons", []):
        verdict = "" if one["p_holm"] < 0.05 else ", no significant difference"
        lines.append(
            f"- {titles.get(one['task'], one['task'])}: {labels[one['encoder']]} against {labels[one['against']]} "
            f"{100 * one['difference']:+.1f} points "
            f"(95 % interval {100 * one['low']:.1f} … {100 * one['high']:.1f}, corrected p = {one['p_holm']:.3f}{verdict})"
        )
    return ["\n".join(lines)] if lines else []


def _limits(config: Mapping[str, Any], kind: str, done: Mapping[str, Any]) -> str:
    domains = [name for name, share in config["data"]["domains"].items() if share]
    lines = [
        f"For features of {', '.join(domains)}: classification, retrieval, the audio side of a language model. It has not been tried on "
        "anything else than what stands above.",
        "It hears at most 30 s at a time and nothing above 8 kHz.",
        "What its training data holds of accents, places and styles, and what it lacks, it holds and lacks too; nobody has measured that.",
        "Not for identifying people, nor for decisions about them.",
    ]
    if kind == "whisper":
        lines.append("Its texts can be fluent and wrong.")
    if not done:
        lines.append("**The run was not finished when this was exported.**")
    return "\n".join(f"- {line}" for line in lines)


def _start(config: Mapping[str, Any]) -> str:
    """Return the hub id that a run started from, or the bare name of a directory: where it lay is nobody's business."""
    model = config["model"]
    path = "" if model.get("random_init") or model.get("scratch") else str(model.get("path", ""))
    return path if path.count("/") == 1 and not Path(path).is_dir() else Path(path).name


def _table(head: list[str], rows: list[list[str]]) -> str:
    align = [":---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *rows])


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
