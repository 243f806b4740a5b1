"""Write the model card of an export, including the metadata block that the Hugging Face hub reads.

Everything on the card comes from files of the run: `config.yaml`, `environment.json`, `done.json`
and, if present, `scores.json` and `audit.json`. Scores and audits of later are added by
`update_card`. The text is in `templates/card.md`.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, Template

from whisper_aut import __version__
from whisper_aut.errors import SkipReason, UserError
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.utils import read_json, without_shared_folders, write_text

UNKNOWN_LICENCE = "unknown"
# The hub's `library_name` for the kinds that transformers does not load.
LIBRARIES = {"onnx": "onnx", "qwen2.5-omni": "whisper-aut"}
PADDING_WORDS = {"none": ", clips at their own length", "30s": ", clips padded to 30 s"}
TASK_TYPES = {"word_accuracy": "automatic-speech-recognition", "recall@1": "feature-extraction"}


def write_card(
    run: Path,
    out: Path,
    kind: str,
    dtype: str = "fp32",
    *,
    interpolate: float | None = None,
    decoder: str = "trained",
    checkpoint: Path | None = None,
    name: str = "",
    licence: str = UNKNOWN_LICENCE,
) -> Path:
    """Write the model card of an export into its folder, as `README.md`, and return its path.

    Args:
        run: The run directory that the export was made from.
        out: The folder of the export.
        kind: The export format, one of `hf.KINDS`.
        dtype: The name of the weights' precision.
        interpolate: The fraction of the trained weights, by default that of the run's config. With
            another one, the scores of the run do not apply and are left out.
        decoder: `trained` or `pretrained`, see `hf.export_checkpoint`.
        checkpoint: The checkpoint, by default the run's last one. The metrics and scores of the run
            do not apply to others and are left out.
        name: The name in the usage snippet, such as the hub's `ORG/NAME`. Defaults to the name
            of the folder.
        licence: The licence of the weights, as the hub's identifier.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    environment = read_json(run / "environment.json", default={})
    own = config["model"].get("interpolate", 1.0)
    interpolate = own if interpolate is None else interpolate
    scores = [read_json(run / "scores.json", default={})] if interpolate == own else []
    done = read_json(run / "done.json", default={})
    if checkpoint and checkpoint.resolve() != RunDirectory(run).last_checkpoint.resolve():
        step = re.sub(r"\D", "", checkpoint.resolve().stem).lstrip("0")
        scores, done = [], {"steps": f"{step}, before the end of the run"}
    sources = _sources(config, environment)
    pretrained = _pretrained_name(config)
    roots = [re.sub(r"(/[^/]*\.tar|/train|/)+$", "", source["root"]) for source in sources]
    datasets = dict.fromkeys(
        re.sub(r"[^\w.-]+", "-", name.split("/")[0]) for name in _short_names(roots, 1)
    )
    metadata = ModelCardData(
        license=licence,
        library_name=LIBRARIES.get(kind, "transformers"),
        # The hub shows a pipeline snippet for this tag. Only recognition has a working pipeline.
        pipeline_tag="automatic-speech-recognition" if kind == "whisper" else None,
        base_model=pretrained if "/" in pretrained else None,
        datasets=list(datasets) or None,
        tags=["audio", "whisper", "whisper-aut"],
    )
    # Every export kind contains the run's encoder, so its scores apply to all of them.
    _add_results(metadata, config["name"], scores, [config["name"]])
    values = {
        "kind": kind,
        "dtype": dtype,
        "interpolate": interpolate,
        "decoder": decoder,
        "name": name or out.name,
        "version": __version__,
        "licence": licence,
        "config": config,
        "environment": environment,
        "done": done,
        "pretrained": pretrained,
        "sources": sources,
        "mixture": _mixture(sources),
        "unlicensed": sum(one["weight"] for one in sources if not one["licences"]),
        "non_commercial": sum(one["weight"] for one in sources if "-NC" in one["licences"].upper()),
        "audit": _audit_lines(read_json(run / "audit.json", default={})),
        "excluded": sum(
            one.get("left_out", {}).get(SkipReason.EXCLUDED, 0)
            for one in environment.get("data", [])
        ),
        "domains": [domain for domain, weight in config["data"]["domains"].items() if weight],
        **_score_values(scores, [config["name"]]),
    }
    text = _template().render(metadata=metadata.to_yaml(), **values)
    return _save(ModelCard(re.sub(r"\n{3,}", "\n\n", text), ignore_metadata_errors=False), out)


def update_card(
    folder: Path,
    scores: Sequence[Mapping[str, Any]],
    *,
    encoder: str = "",
    audit: Mapping[str, Any] | None = None,
) -> Path:
    """Replace the scores, and if given the audit, in the card of an export, and return its path.

    The rest of the card stays as it is, including what was changed by hand.

    Args:
        folder: The export.
        scores: The contents of `scores.json` files, with different kinds of probes.
        encoder: The name of the export's encoder in the scores. Padding modes in the scores'
            names do not matter. Defaults to the title of the card or the name of the folder.
        audit: The content of an `audit.json`.

    Raises:
        UserError: There is no card with these sections, or the scores are not of this encoder.
    """
    path = folder / "README.md"
    if not path.is_file():
        raise UserError(f"{folder} has no model card (README.md). Export it: whisper-aut export.")
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} has no valid metadata block: {error}") from None
    title = re.search(r"^# (.+)$", card.text, re.M)
    names = [encoder] if encoder else [title[1] if title else folder.name, folder.resolve().name]
    entries = [entry for one in scores for entry in one.get("entries", [])]
    if scores and not any(_is_own(entry, names) for entry in entries):
        found = ", ".join(dict.fromkeys(entry["encoder"] for entry in entries))
        raise UserError(
            f"The scores are of {found}, not of {names[0]}. Name the encoder of {folder}: "
            "--encoder NAME."
        )
    sections = {"Probes": _score_values(scores, names)} if scores else {}
    if audit is not None:
        sections["Overlap with the probe sets"] = {"audit": _audit_lines(audit), "excluded": None}
    template = _template()
    for heading, values in sections.items():
        block = template.blocks[heading.partition(" ")[0].lower()]
        text = "".join(block(template.new_context(values)))
        section = re.compile(rf"^## {heading}\n.*?(?=^## |\Z)", re.M | re.S)
        if not section.search(card.text):
            raise UserError(f"{path} has no section '## {heading}' to write to.")
        text = re.sub(r"\n{3,}", "\n\n", text.rstrip() + "\n\n")
        card.text = section.sub(lambda _, text=text: text, card.text, count=1)
    if scores:
        assert isinstance(card.data, ModelCardData)
        _add_results(card.data, names[0], scores, names)
    return _save(card, folder)


def _save(card: ModelCard, out: Path) -> Path:
    content = f"---\n{card.data.to_yaml()}\n---\n\n{card.text.strip()}\n"
    ModelCard(content, ignore_metadata_errors=False)  # as the hub reads it
    write_text(out / "README.md", content)
    return out / "README.md"


def _template() -> Template:
    templates = Environment(
        loader=PackageLoader("whisper_aut.export"), trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["cell"] = _escape
    return templates.get_template("card.md")


def _escape(text: str) -> str:
    """Escape what would end a table cell or be HTML: names come from files of other people."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _add_results(
    metadata: ModelCardData, model: str, scores: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Set the scores of the encoder with one of the names as the `model-index`."""
    entries = [e for one in scores for e in one.get("entries", []) if _is_own(e, names)]
    results = [
        EvalResult(
            task_type=TASK_TYPES.get(entry["metric"], "audio-classification"),
            dataset_type=entry["task"],
            dataset_name=entry["title"],
            dataset_split="test",
            metric_type=entry["metric"],
            metric_name=f"{entry['metric']}, {entry['kind']} probe, protocol {entry['protocol']}"
            + PADDING_WORDS.get(entry.get("padding"), ""),
            metric_value=round(entry["mean"], 4),
            metric_args={
                "test_clips": entry["clips"].get("test") or sum(entry["clips"].values()),
                "final_fit": entry["final_fit"],
                **(
                    {"interval_95": [round(end, 4) for end in entry["interval"]]}
                    if entry["std"] is None
                    else {"std": round(entry["std"], 4), "seeds": len(entry["seeds"])}
                ),
            },
        )
        for entry in entries
    ]
    metadata.model_name = model if results else None
    metadata.eval_results = results or None
    metadata.metrics = sorted({entry["metric"] for entry in entries}) or None


def _is_own(entry: Mapping[str, Any], names: Sequence[str]) -> bool:
    return entry["encoder"] in names or entry["encoder"].rpartition("@")[0] in names


def _sources(config: Mapping[str, Any], environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the training sources, with the licences of their clips or else of the source."""
    stated = {source["path"]: source.get("licence", "") for source in config["data"]["train"]}
    sources, found = [], environment.get("data", [])
    names = _short_names([source["root"] for source in found], 2)
    for name, source in zip(names, found, strict=True):
        licences = [licence for licence in source.get("licences", []) if licence]
        joined = ", ".join(licences) or stated.get(source["root"], "")
        sources.append({**source, "name": name, "licences": joined})
    return sources


def _short_names(roots: Sequence[str], parts: int) -> list[str]:
    """Return folders or URLs without the folders that they share. If they share none and some are
    absolute, only the last parts of each: the card is published, so it must not reveal paths.
    """
    names = without_shared_folders(roots)
    shared = {root.rstrip("/").removesuffix(name) for root, name in zip(roots, names, strict=True)}
    if shared <= {"", "/"} and any(root.startswith("/") or "://" in root for root in roots):
        return ["/".join(name.strip("/").split("/")[-parts:]) for name in names]
    return names


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


def _audit_lines(audit: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(_flatten(audit.get("counts", {})))


def _score_values(scores: Sequence[Mapping[str, Any]], own: Sequence[str]) -> dict[str, Any]:
    """Return what the template needs to lay out scores, each with its kind of probe."""
    entries = [entry for one in scores for entry in one.get("entries", [])]
    if not entries:
        return {"rows": []}
    labels = {}
    for entry in entries:  # as in `probes.results.Scores.label`
        encoder, mark = entry["encoder"], f"@{entry['padding']}" if entry.get("padding") else ""
        labels[encoder] = encoder if encoder.endswith(mark) else f"{encoder}{mark}"
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    titles = {entry["task"]: entry["title"] for entry in entries}
    titles |= {"average": "weighted average"}
    differences = []
    for one in scores:
        found = one.get("entries", [])
        for entry in found:
            row = rows.setdefault((entry["task"], entry["metric"], entry["kind"]), {})
            row[entry["encoder"]] = _score_cell(entry)
        kinds = " or ".join(sorted({entry["kind"] for entry in found}))
        count = len({entry["task"] for entry in found})
        for average in one.get("averages", []):  # of encoders that have a score of every task
            if average["domain"] == "average" and average["tasks"] == count > 1:
                row = rows.setdefault(("average", "", kinds), {})
                row[average["encoder"]] = _score_cell(average)
        for comparison in one.get("comparisons", []):
            if _is_own(comparison, own):
                differences.append({**comparison, "kind": kinds})
    return {
        "rows": rows,
        "titles": titles,
        "labels": labels,
        "own": [encoder for encoder in labels if _is_own({"encoder": encoder}, own)],
        "protocols": sorted({entry["protocol"] for entry in entries}),
        "differences": differences,
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
