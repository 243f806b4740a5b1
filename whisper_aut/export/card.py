"""Write the model card of an export, including the metadata block that the Hugging Face hub reads.

Everything on the card comes from files of the run: `config.yaml`, `environment.json`, `done.json`
and, if present, `scores.json` and `audit.json`. The text is in `templates/card.md`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader

from whisper_aut import __version__
from whisper_aut.errors import SkipReason
from whisper_aut.utils import read_json, without_shared_folders, write_text

UNKNOWN_LICENCE = "unknown"
# The hub's `library_name` for the kinds that transformers does not load.
LIBRARIES = {"onnx": "onnx", "qwen2.5-omni": "whisper-aut"}
TASK_TYPES = {"word_accuracy": "automatic-speech-recognition", "recall@1": "feature-extraction"}


def write_card(
    run: Path,
    out: Path,
    kind: str,
    dtype: str = "fp32",
    *,
    interpolate: float = 1.0,
    name: str = "",
    licence: str = UNKNOWN_LICENCE,
) -> Path:
    """Write the model card of an export into its folder, as `README.md`, and return its path.

    Args:
        run: The run directory that the export was made from.
        out: The folder of the export.
        kind: The export format, one of `hf.KINDS`.
        dtype: The name of the weights' precision.
        interpolate: The fraction of the trained weights. The scores of the run are left out if it
            is not 1, because they are those of the trained weights.
        name: The name in the usage snippet, such as the hub's `ORG/NAME`. Defaults to the name
            of the folder.
        licence: The licence of the weights, as the hub's identifier.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    environment = read_json(run / "environment.json", default={})
    scores = read_json(run / "scores.json", default={}) if interpolate == 1 else {}
    audit = read_json(run / "audit.json", default={})
    sources = _sources(config, environment)
    values = {
        "kind": kind,
        "dtype": dtype,
        "interpolate": interpolate,
        "name": name or out.name,
        "version": __version__,
        "config": config,
        "environment": environment,
        "done": read_json(run / "done.json", default={}),
        "pretrained": _pretrained_name(config),
        "sources": sources,
        "mixture": _mixture(sources),
        "unlicensed": sum(one["weight"] for one in sources if not one["licences"]),
        "audit": list(_flatten(audit.get("counts", {}))),
        "excluded": sum(
            one.get("left_out", {}).get(SkipReason.EXCLUDED, 0)
            for one in environment.get("data", [])
        ),
        "domains": [domain for domain, weight in config["data"]["domains"].items() if weight],
        **_score_values(scores),
    }
    metadata = _metadata(config, scores, sources, kind, licence)
    templates = Environment(
        loader=PackageLoader("whisper_aut.export"), trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    text = templates.get_template("card.md").render(metadata=metadata.to_yaml(), **values)
    card = ModelCard(re.sub(r"\n{3,}", "\n\n", text), ignore_metadata_errors=False)
    write_text(out / "README.md", str(card))
    return out / "README.md"


def _metadata(
    config: Mapping[str, Any],
    scores: Mapping[str, Any],
    sources: list[dict[str, Any]],
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
    pretrained = _pretrained_name(config)
    corpora = [source["name"].split("/")[0] for source in sources]
    datasets = dict.fromkeys(re.sub(r"[^\w.-]+", "-", corpus) for corpus in corpora)
    return ModelCardData(
        license=licence,
        library_name=LIBRARIES.get(kind, "transformers"),
        # The hub shows a pipeline snippet for this tag. Only recognition has a working pipeline.
        pipeline_tag="automatic-speech-recognition" if kind == "whisper" else None,
        base_model=pretrained if "/" in pretrained else None,
        datasets=list(datasets) or None,
        metrics=sorted({entry["metric"] for entry in entries}) or None,
        tags=["audio", "whisper", "whisper-aut"],
        model_name=config["name"] if results else None,
        eval_results=results or None,
    )


def _sources(config: Mapping[str, Any], environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the training sources, with the licences of their clips or else of the source."""
    stated = {source["path"]: source.get("licence", "") for source in config["data"]["train"]}
    sources, found = [], environment.get("data", [])
    names = without_shared_folders([source["root"] for source in found])
    for name, source in zip(names, found, strict=True):
        licences = [licence for licence in source.get("licences", []) if licence]
        joined = ", ".join(licences) or stated.get(source["root"], "")
        sources.append({**source, "name": name, "licences": joined})
    return sources


def _mixture(sources: list[dict[str, Any]]) -> str:
    weights = Counter[str]()
    for source in sources:
        weights[source["domain"]] += source["weight"]
    return ", ".join(f"{weight:.0%} {domain}" for domain, weight in weights.most_common())


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name} ")
        else:
            yield name, value


def _score_values(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template needs to lay out `scores.json`."""
    entries = scores.get("entries", [])
    if not entries:
        return {"scores": None}
    encoders = {}
    for entry in entries:  # labels as in `probes.results.Scores.label`
        encoder, mark = entry["encoder"], f"@{entry['padding']}" if entry.get("padding") else ""
        encoders[encoder] = encoder if encoder.endswith(mark) else f"{encoder}{mark}"
    return {
        "scores": scores,
        "encoders": encoders,
        "tasks": {
            entry["task"]: f"{entry['title']} ({entry['metric']}, {entry['kind']})"
            for entry in entries
        },
        "cells": {(entry["task"], entry["encoder"]): _score_cell(entry) for entry in entries},
        "fitted_on": " or ".join(sorted({f"`{entry['final_fit']}`" for entry in entries})),
        "seeds": max(len(entry["seeds"]) for entry in entries),
        "intervals": any(entry["std"] is None for entry in entries),
    }


def _score_cell(entry: Mapping[str, Any]) -> str:
    if entry["std"] is not None:
        return f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}"
    low, high = entry["interval"]
    return f"{100 * entry['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _pretrained_name(config: Mapping[str, Any]) -> str:
    """Return the hub id that a run started from, or the name of a local directory.

    The card is published, so it must not reveal local paths. Empty for a random initialisation.
    """
    model = config["model"]
    path = "" if model.get("random_init") or model.get("scratch") else str(model.get("path", ""))
    return path if path.count("/") == 1 and not Path(path).is_dir() else Path(path).name
