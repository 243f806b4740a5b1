"""Write the model card of an export, including the metadata block that the Hugging Face hub reads.

Everything on the card comes from files of the run: `config.yaml`, `environment.json`, `done.json`
and, if present, `scores.json` and `audit.json`. The card states what the run did not record.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCardData

from whisper_aut import __version__
from whisper_aut.errors import SkipReason

CARD = "README.md"
UNKNOWN_LICENCE = "unknown"
PAPERS = {
    "whisper": "AuT ([arXiv 2604.10438](https://arxiv.org/abs/2604.10438)): "
    "encoder and decoder fine-tuned on texts of all domains.",
    "causal_lm": "UniWhisper ([arXiv 2602.21772](https://arxiv.org/abs/2602.21772)): "
    "the encoder learns through an adapter and a language model.",
}
SWAP = """from transformers import {model}

from whisper_aut.export.towers import swap_tower

model = {model}.from_pretrained("{repository}")  # or another of its architecture
swap_tower(model, "{{name}}")"""
# Usage snippet per export kind. `{name}` is the export's folder or its repository on the hub.
USES = {
    "encoder": """With whisper-aut, at each clip's own length where the encoder was trained so:

```python
import whisper_aut

encoder = whisper_aut.load_encoder("{name}")
(frames,) = encoder.encode(["clip.wav"])  # [T, D], a frame every 20 ms
```

With transformers alone, which pads each clip to 30 s:

```python
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModel

encoder = AutoModel.from_pretrained("{name}").encoder.eval()
features = AutoFeatureExtractor.from_pretrained("{name}")
waveform, rate = soundfile.read("clip.wav")  # 16 kHz, one channel
inputs = features(waveform, sampling_rate=rate, return_tensors="pt").input_features
with torch.no_grad():
    frames = encoder(inputs).last_hidden_state[:, : len(waveform) // 320]  # [1, T, D]
```""",
    "whisper": """```python
import soundfile
from transformers import pipeline

recognise = pipeline("automatic-speech-recognition", model="{name}")
waveform, rate = soundfile.read("clip.wav")  # one channel; a path in its place needs ffmpeg
print(recognise({{"raw": waveform, "sampling_rate": rate}})["text"])
```""",
    "onnx": """```python
import onnxruntime
import soundfile

session = onnxruntime.InferenceSession("{name}/encoder.onnx")
waveform, _ = soundfile.read("clip.wav", dtype="float32")  # 16 kHz, one channel
(frames,) = session.run(None, {{"waveform": waveform}})  # [T, D]
```""",
    **{
        kind: f"```python\n{SWAP.format(model=model, repository=repository)}\n```"
        for kind, model, repository in (
            ("qwen2-audio", "Qwen2AudioForConditionalGeneration", "Qwen/Qwen2-Audio-7B"),
            (
                "qwen2.5-omni",
                "Qwen2_5OmniThinkerForConditionalGeneration",
                "Qwen/Qwen2.5-Omni-3B",
            ),
            ("voxtral", "VoxtralForConditionalGeneration", "mistralai/Voxtral-Mini-3B-2507"),
        )
    },
}
# The hub's `library_name` for the kinds that transformers does not load.
LIBRARIES = {"onnx": "onnx", "qwen2.5-omni": "whisper-aut"}
TASK_TYPES = {"word_accuracy": "automatic-speech-recognition", "recall@1": "feature-extraction"}


def write_card(
    run: Path,
    out: Path,
    kind: str,
    dtype: str = "fp32",
    *,
    name: str = "",
    licence: str = UNKNOWN_LICENCE,
) -> Path:
    """Write the model card of an export into its folder.

    Args:
        run: The run directory that the export was made from.
        out: The folder of the export.
        kind: The export format, a key of `USES`.
        dtype: The name of the weights' precision.
        name: The name in the usage snippet, such as the hub's `ORG/NAME`. Defaults to the name
            of the folder.
        licence: The licence of the weights, as the hub's identifier.

    Returns:
        The path of the card, `out/README.md`.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    facts, done = _json(run / "environment.json"), _json(run / "done.json")
    scores = _json(run / "scores.json")
    sections = [
        f"---\n{_metadata(config, facts, scores, kind, licence).to_yaml()}\n---",
        f"# {config['name']}\n\n{_opening(config, kind, dtype)}",
        f"## Use\n{USES[kind].format(name=name or out.name)}",
        f"## Recipe\n{_recipe(config, facts, done)}",
        f"## Training data\n{_data(config, facts)}",
        f"## Overlap with the probe sets\n{_audit(_json(run / 'audit.json'), facts)}",
        f"## Probes\n{_probes(scores)}",
        f"## Intended use and limits\n{_limits(config, kind, done)}",
    ]
    path = out / CARD
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _metadata(
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    scores: Mapping[str, Any],
    kind: str,
    licence: str,
) -> ModelCardData:
    # Every export kind contains the run's encoder, so its scores apply to all of them.
    entries = [one for one in scores.get("entries", []) if one["encoder"] == config["name"]]
    results = [
        EvalResult(
            task_type=TASK_TYPES.get(entry["metric"], "audio-classification"),
            dataset_type=entry["task"],
            dataset_name=entry["title"],
            dataset_split="test",
            metric_type=entry["metric"],
            metric_name=f"{entry['metric']}, {entry['kind']} probe, protocol {entry['protocol']}",
            metric_value=round(float(np.mean(entry["scores"])), 4),
        )
        for entry in entries
    ]
    start = _start(config)
    sources = (re.sub(r"[^\w.-]+", "-", Path(one["root"]).name) for one in facts.get("data", []))
    return ModelCardData(
        license=licence,
        library_name=LIBRARIES.get(kind, "transformers"),
        # The hub shows a pipeline snippet for this tag. Only recognition has a working pipeline.
        pipeline_tag="automatic-speech-recognition" if kind == "whisper" else None,
        base_model=start if "/" in start else None,
        datasets=list(dict.fromkeys(sources)) or None,
        metrics=sorted({entry["metric"] for entry in entries}) or None,
        tags=["audio", "whisper", "whisper-aut"],
        model_name=config["name"] if results else None,
        eval_results=results or None,
    )


def _opening(config: Mapping[str, Any], kind: str, dtype: str) -> str:
    what = {
        "encoder": "An audio encoder in Whisper's format, without a decoder.",
        "whisper": "A Whisper encoder with the decoder that was trained beside it.",
        "onnx": "An audio encoder as an ONNX graph: 16 kHz waveform in, frames out.",
    }.get(kind, f"The encoder's weights as the audio tower of {kind}.")
    length = (
        "It was trained on clips at their own length: "
        'run it so (`padding="none"`), as `load_encoder` does.'
        if config["model"]["padding"] == "none"
        else "It was trained on clips padded to 30 s: "
        'run it so (`padding="30s"`), as `load_encoder` does.'
    )
    return (
        f"{what} A frame every 20 ms; weights in {dtype}. {length} "
        f"Made with whisper-aut {__version__}."
    )


def _recipe(config: Mapping[str, Any], facts: Mapping[str, Any], done: Mapping[str, Any]) -> str:
    optim, trainer, decoder = config["optim"], config["trainer"], config["decoder"]
    lines = {
        "recipe": PAPERS.get(decoder["name"], f"decoder `{decoder['name']}`"),
        "started from": _start(config) or "a random initialisation",
        "taught through": facts.get("decoder", {}).get("language_model")
        or decoder.get("language_model")
        or "its own decoder",
        "optimiser": f"AdamW, learning rate {optim['lr']:g}, {optim['schedule']} schedule, "
        f"{optim['warmup_steps']} warm-up steps, weight decay {optim['weight_decay']:g}",
        "steps": f"{done.get('steps', 'unfinished')} of "
        f"{config['data']['batch_clips'] * trainer['accumulate']} clips a rank",
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
            f"{source['weight']:.1%}",
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
        shares[source["domain"]] += source["weight"]
    mixture = ", ".join(f"{share:.0%} {domain}" for domain, share in shares.most_common())
    unknown = sum(
        source["weight"] for source in facts["data"] if not _licences(source, stated).strip("–")
    )
    note = f"\n\n{unknown:.0%} of what was trained on states no licence." if unknown else ""
    return (
        f"{mixture}, by clips.\n\n"
        f"{_table(['source', 'domain', 'share', 'clips', 'hours', 'licence'], rows)}{note}"
    )


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
    excluded = sum(
        source.get("left_out", {}).get(SkipReason.EXCLUDED, 0) for source in facts.get("data", [])
    )
    return (
        f"`whisper-aut data audit` compared the training data with the probe sets:\n{counts}\n"
        f"- clips left out of training: {excluded}"
    )


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
    fitted = " or ".join(sorted({f"`{entry['final_fit']}`" for entry in entries}))
    seeds = max(len(entry["seeds"]) for entry in entries)
    spread = f"± is the standard deviation over {seeds} seeds of probes with a random start. "
    fixed = any(entry["std"] is None for entry in entries)
    between = (
        "Brackets hold the 95 % interval over the choice of test clips, "
        "or of the groups that they come in. "
    )
    note = (
        f"Protocol `{scores['protocol']}`: settings are chosen on validation clips, "
        f"and the tested probe is fitted on the full split {fitted}, "
        "or in folds on all other folds. "
        f"{spread if seeds > 1 else ''}{between if fixed else ''}"
        "The frozen encoder's frames are pooled over each clip's own length."
    )
    return "\n\n".join([table, note, *_differences(scores, titles, labels)])


def _score(entry: Mapping[str, Any]) -> str:
    if entry["std"] is not None:
        return f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}"
    low, high = entry["interval"]
    return f"{100 * entry['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _labels(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Map each encoder to its label in tables, as `probes.results.Scores.label` does."""
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
            f"- {titles.get(one['task'], one['task'])}: "
            f"{labels[one['encoder']]} against {labels[one['against']]} "
            f"{100 * one['difference']:+.1f} points "
            f"(95 % interval {100 * one['low']:.1f} … {100 * one['high']:.1f}, "
            f"corrected p = {one['p_holm']:.3f}{verdict})"
        )
    return ["\n".join(lines)] if lines else []


def _limits(config: Mapping[str, Any], kind: str, done: Mapping[str, Any]) -> str:
    domains = [name for name, share in config["data"]["domains"].items() if share]
    lines = [
        f"For features of {', '.join(domains)}: classification, retrieval, "
        "the audio side of a language model. "
        "It has not been tried on anything else than what stands above.",
        "It hears at most 30 s at a time and nothing above 8 kHz.",
        "What its training data holds of accents, places and styles, and what it lacks, "
        "it holds and lacks too; nobody has measured that.",
        "Not for identifying people, nor for decisions about them.",
    ]
    if kind == "whisper":
        lines.append("Its texts can be fluent and wrong.")
    if not done:
        lines.append("**The run was not finished when this was exported.**")
    return "\n".join(f"- {line}" for line in lines)


def _start(config: Mapping[str, Any]) -> str:
    """Return the hub id that a run started from, or the name of a local directory.

    The card is published, so it must not reveal local paths. Empty for a random initialisation.
    """
    model = config["model"]
    path = "" if model.get("random_init") or model.get("scratch") else str(model.get("path", ""))
    return path if path.count("/") == 1 and not Path(path).is_dir() else Path(path).name


def _table(head: list[str], rows: list[list[str]]) -> str:
    align = [":---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *rows])


def _json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file is missing, damaged or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
