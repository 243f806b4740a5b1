"""Build the report of one or more runs as Markdown and as a self-contained HTML page.

The HTML page embeds its pictures and audio, fetches nothing, and runs no scripts. Contrast and
text sizes follow WCAG 2.2 AA.
"""

import io
import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from matplotlib.image import imsave
from rich.console import Console

from whisper_aut.audio.decode import SAMPLE_RATE_HZ, ClipLimits, load_waveform
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.data.annotation import read_lines
from whisper_aut.data.reader import Sample, iter_samples
from whisper_aut.data.shards import open_index
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.probes.embed import BASELINE_NAME
from whisper_aut.probes.results import Scores
from whisper_aut.report.plots import (
    plot_confusions,
    plot_learning,
    plot_losses,
    plot_maps,
    plot_scores,
    plot_speed,
    read_metrics,
    shown_encoders,
)
from whisper_aut.report.tables import Sheet, markdown, rich_table, scores_csv, sheets
from whisper_aut.training.run_dir import RunDirectory


@dataclass(frozen=True)
class Picture:
    """A PNG file and its caption, which is also its alternative text for screen readers."""

    path: Path
    caption: str


@dataclass(frozen=True)
class ListenedClip:
    """A validation clip and the text that the decoder generated for it.

    Attributes:
        title: The clip's domain, task, key and duration.
        reference: The expected text.
        generated: The generated text.
        ogg: The clip as Ogg Vorbis; empty if it was not found.
        spectrogram: Its log-mel spectrogram as PNG; empty if it was not found.
    """

    title: str
    reference: str
    generated: str
    ogg: bytes = b""
    spectrogram: bytes = b""


Block = str | Sheet | Picture | ListenedClip


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """The report of one run."""

    title: str
    sections: list[Section]


def markdown_page(runs: Sequence[Run]) -> str:
    """Render runs as one Markdown page, without the audio."""
    parts = ["# Report"]
    for run in runs:
        parts.append(f"## {run.title}")
        for section in run.sections:
            parts += [f"### {section.title}", *(_markdown(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Sheet):
        return markdown(block)
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.path.name})"
    if isinstance(block, ListenedClip):
        return f"- {block.title}: should be “{block.reference}”, written “{block.generated}”"
    return block


STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; color: #1d2329; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, \
sans-serif; }
h1 { font-size: 1.8rem; margin: 0 0 .5rem; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 2px solid #0072b2; }
h3 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; }
nav { margin: .5rem 0 1rem; }
nav a { margin-right: 1rem; }
a { color: #005a8c; }
.table { overflow-x: auto; margin: .6rem 0 .2rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .28rem .42rem; border-bottom: 1px solid #dde3e8; text-align: right; \
white-space: nowrap; }
th { border-bottom: 2px solid #9aa5b1; }
th.text, td.text { text-align: left; white-space: normal; }
tbody tr:nth-child(even) { background: #f5f7f9; }
.note { color: #4a5560; font-size: .88rem; margin: .2rem 0 1rem; max-width: 52rem; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #4a5560; font-size: .88rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.clip { border: 1px solid #dde3e8; border-radius: .4rem; padding: .7rem; font-size: .9rem; \
break-inside: avoid; }
.clip h4 { margin: 0 0 .4rem; font-size: .9rem; overflow-wrap: anywhere; }
.clip img { width: 100%; height: 5rem; }
.clip audio { width: 100%; margin: .3rem 0; }
.clip dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .6rem; }
.clip dt { color: #4a5560; } .clip dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } \
audio, nav { display: none; } h2 { break-before: page; }
               h2:first-of-type { break-before: auto; } .table { overflow: visible; } \
th, td { white-space: normal; } }
"""


def html_page(runs: Sequence[Run], title: str = "whisper_aut report") -> str:
    """Render runs as one HTML page.

    The links at the top lead to the runs or, if there is only one, to its sections.
    """
    body = "".join(_run_section(run, number) for number, run in enumerate(runs))
    links = [(f"r{i}", run.title) for i, run in enumerate(runs)]
    if len(runs) == 1:
        links = [(f"r0s{j}", section.title) for j, section in enumerate(runs[0].sections)]
    nav = "".join(f'<a href="#{place}">{escape(text)}</a>' for place, text in links)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1><nav>{nav}</nav>\n{body}</body></html>\n"
    )


def _run_section(run: Run, number: int) -> str:
    sections = "".join(
        _section(section, f"r{number}s{place}") for place, section in enumerate(run.sections)
    )
    return f'<h2 id="r{number}">{escape(run.title)}</h2>\n{sections}'


def _section(section: Section, place: str) -> str:
    parts, clips = [], []
    for block in section.blocks:
        if isinstance(block, ListenedClip):
            clips.append(_clip_player(block))
        else:
            parts.append(_block(block))
    gathered = f'<div class="clips">{"".join(clips)}</div>\n' if clips else ""
    return (
        f'<section id="{place}"><h3>{escape(section.title)}</h3>\n'
        f"{''.join(parts)}{gathered}</section>\n"
    )


def _block(block: Block) -> str:
    if isinstance(block, Sheet):
        return _table(block)
    if isinstance(block, Picture):
        picture = _embedded("image/png", block.path.read_bytes())
        return (
            f'<figure><img src="{picture}" alt="{escape(block.caption)}">'
            f"<figcaption>{escape(block.caption)}</figcaption></figure>\n"
        )
    assert isinstance(block, str)
    return f'<p class="note">{escape(block)}</p>\n'


def _table(sheet: Sheet) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        kinds = (
            'class="text"' if number < sheet.text_columns else "" for number in range(len(row))
        )
        return "".join(
            f"<{tag} {kind}>{escape(cell)}</{tag}>" for cell, kind in zip(row, kinds, strict=True)
        )

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in sheet.rows)
    note = f'<p class="note">{escape(sheet.caption)}</p>' if sheet.caption else ""
    return (
        f'<div class="table"><table><caption>{escape(sheet.title)}</caption>'
        f"<thead><tr>{cells(sheet.head, 'th')}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{note}\n"
    )


def _clip_player(clip: ListenedClip) -> str:
    seen = f"log-mel of {escape(clip.title)}, time to the right, mel bins upwards"
    picture = (
        f'<img src="{_embedded("image/png", clip.spectrogram)}" alt="{seen}">'
        if clip.spectrogram
        else ""
    )
    player = (
        f'<audio controls preload="none" src="{_embedded("audio/ogg", clip.ogg)}"></audio>'
        if clip.ogg
        else ""
    )
    texts = (
        f"<dl><dt>should be</dt><dd>{escape(clip.reference)}</dd>"
        f"<dt>written</dt><dd>{escape(clip.generated)}</dd></dl>"
    )
    return f'<div class="clip"><h4>{escape(clip.title)}</h4>{picture}{player}{texts}</div>'


def _embedded(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


# Metric → its title, the factor to print it with, and its decimals.
FIGURES = {
    "throughput/audio_seconds_per_second": ("audio-seconds a second", 1, 1),
    "throughput/clips_per_second": ("clips a second", 1, 1),
    "throughput/tokens_per_second": ("tokens a second", 1, 0),
    "throughput/data_wait_fraction": ("waiting for data, % of the time", 100, 1),
    "throughput/padding_fraction": ("padding, % of the frames", 100, 1),
    "throughput/teraflops": ("model TFLOP/s", 1, 3),
    "throughput/mfu": ("MFU, %", 100, 1),
    "throughput/peak_memory_gib": ("peak memory, GiB", 1, 2),
}


def run_sheet(run: Path) -> Sheet | None:
    """Lay out the machine, the package versions and the throughput metrics of a run.

    Returns:
        The table, or None if the run recorded no environment.
    """
    facts, done = _read(run / "environment.json"), _read(run / "done.json")
    if not facts:
        return None
    metrics = done.get("metrics", {})
    packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items())
    rows = [
        ("command", " ".join(facts.get("command", []))),
        ("revision", facts.get("git", "")),
        ("machine", f"{facts.get('machine', '')}, {facts.get('cpus', '?')} cores"),
        ("GPUs", ", ".join(facts.get("gpus", [])) or "none"),
        ("packages", f"Python {facts.get('python', '')}, {packages}"),
        ("start", _place(facts.get("pretrained", {}))),
        (
            "decoder",
            ", ".join(
                f"{name} {value}" for name, value in facts.get("decoder", {}).items() if value
            ),
        ),
        ("steps", str(done.get("steps", f"stopped before {facts.get('steps', '?')}"))),
    ]
    rows += [
        (title, f"{scale * metrics[name]:,.{digits}f}")
        for name, (title, scale, digits) in FIGURES.items()
        if name in metrics
    ]
    return Sheet("Where and how it ran", "", ("", ""), tuple(row for row in rows if row[1]), 2)


def data_sheet(run: Path) -> Sheet | None:
    """Lay out the training sources: their contents, epochs, and requested and actual weights.

    Returns:
        The table, or None if the run recorded no sources.
    """
    sources, epochs = (
        _read(run / "environment.json").get("data", []),
        _read(run / "done.json").get("sources", {}),
    )
    if not sources:
        return None
    heard = [epochs.get(source.get("root"), 0) * source.get("clips", 0) for source in sources]
    rows = tuple(
        (
            source.get("root", ""), source.get("domain", ""), _licences(source),
            f"{source.get('clips', 0):,}", f"{source.get('seconds', 0) / 3600:,.2f}",
            _share(source.get("weight", 0), [s.get("weight", 0) for s in sources]),
            _share(clips, heard),
            f"{epochs[source['root']]:.2f}" if source.get("root") in epochs else "–",
        )
        for source, clips in zip(sources, heard, strict=True)
    )  # fmt: skip
    head = (
        "source",
        "domain",
        "licences",
        "clips",
        "hours",
        "share asked (%)",
        "share heard (%)",
        "epochs",
    )
    return Sheet(
        "What it was trained on",
        "Shares are by clips, of the mixture that was asked for and of what was drawn.",
        head,
        rows,
        3,
    )


def _licences(source: dict[str, Any]) -> str:
    return (
        ", ".join(source.get("licences") or ([source["licence"]] if source.get("licence") else []))
        or "–"
    )


def _share(part: float, parts: list[float]) -> str:
    return f"{100 * part / sum(parts):.1f}" if sum(parts) else "–"


def refusal_sheet(run: Path) -> Sheet | None:
    """Lay out the number of skipped samples by source and reason; None if there were none."""
    refused = _read(run / "done.json").get("skipped", {})
    rows = tuple(
        (source, reason, f"{count:,}")
        for source, reasons in refused.items()
        for reason, count in reasons.items()
    )
    if not rows:
        return None
    return Sheet(
        "Refused samples",
        "`ledger.jsonl` lists each; `ledger-rankN.jsonl` of other ranks.",
        ("source", "reason", "samples"),
        rows,
        2,
    )


def _place(start: dict[str, Any]) -> str:
    return " at ".join(str(start[name]) for name in ("path", "revision") if start.get(name))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# The most generated texts to show, of each task and in total.
PER_TASK, MOST = 2, 18
MAX_SEARCHED = 20_000  # samples to look through in each validation source
MAX_HEARD_SECONDS = 30
MEL_BINS = 80


@dataclass(frozen=True)
class Written:
    """A line of `samples.jsonl`."""

    step: int
    domain: str
    task: str
    key: str
    reference: str
    generated: str


def last_written(samples: Path) -> list[Written]:
    """Return texts generated at the last validation, at most `PER_TASK` of each task.

    Args:
        samples: The `samples.jsonl` of a run. If it cannot be read, the result is empty.
    """
    entries = [entry for line in _lines(samples) if (entry := _entry(line))]
    newest = max((entry.step for entry in entries), default=0)
    chosen: dict[str, list[Written]] = {}
    for entry in entries:
        if (
            entry.step == newest
            and len(chosen.setdefault(f"{entry.domain} {entry.task}", [])) < PER_TASK
        ):
            chosen[f"{entry.domain} {entry.task}"].append(entry)
    return [entry for listed in chosen.values() for entry in listed][:MOST]


def listened(run: Path) -> list[ListenedClip]:
    """Return the texts of a run's last validation with their clips.

    Clips are missing if the validation shards have moved since.
    """
    written = last_written(run / "samples.jsonl")
    clips = dict(_clips(_validation_folders(run / "config.yaml"), {entry.key for entry in written}))
    return [_listen(entry, clips) for entry in written]


def _listen(entry: Written, clips: Mapping[str, np.ndarray]) -> ListenedClip:
    title = f"{entry.domain} · {entry.task or 'text'} · {entry.key}"
    heard = clips.get(entry.key)
    title += f" · {len(heard) / SAMPLE_RATE_HZ:.1f} s" if heard is not None else ""
    if heard is None:
        return ListenedClip(title, entry.reference, entry.generated)
    return ListenedClip(title, entry.reference, entry.generated, _ogg(heard), _spectrogram(heard))


def _lines(samples: Path) -> list[str]:
    try:
        return read_lines(samples)
    except (OSError, UnicodeDecodeError):
        return []


def _entry(line: str) -> Written | None:
    try:
        facts = json.loads(line)
        return Written(
            int(facts["step"]),
            *(
                str(facts.get(name, ""))
                for name in ("domain", "task", "key", "reference", "generated")
            ),
        )
    except (ValueError, KeyError, TypeError):
        return None  # a killed run may leave an unfinished line


def _validation_folders(config: Path) -> list[str]:
    try:
        return [source["path"] for source in yaml.safe_load(config.read_text())["data"]["valid"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []


def _clips(folders: Sequence[str], keys: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    wanted = set(keys)
    for folder in folders:
        try:
            for number, sample in enumerate(iter_samples(open_index(folder), ClipLimits())):
                if not wanted or number == MAX_SEARCHED:
                    break
                if isinstance(sample, Sample) and sample.key in wanted:
                    wanted.remove(sample.key)
                    yield sample.key, load_waveform(sample.audio, ClipLimits()).numpy()
        except (UserError, SkipSample, OSError):
            continue  # if the shards have moved, the texts are shown without audio


def _ogg(waveform: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    peak = max(float(np.abs(waveform).max(initial=0)), 1e-4)
    audible = waveform[: MAX_HEARD_SECONDS * SAMPLE_RATE_HZ] * min(1.0, 0.95 / peak)
    soundfile.write(buffer, audible, SAMPLE_RATE_HZ, format="OGG", subtype="VORBIS")
    return buffer.getvalue()


def _spectrogram(waveform: np.ndarray) -> bytes:
    mel = LogMel(MEL_BINS)(torch.from_numpy(waveform))[: mel_frames(len(waveform))]
    buffer = io.BytesIO()
    # One pixel per mel bin and frame.
    imsave(buffer, mel.T.flip(0).numpy(), cmap="magma", format="png")
    return buffer.getvalue()


MAX_CONFUSIONS = 6  # the most tasks to draw a confusion matrix for


def build_report(runs: Sequence[Path], out: Path, console: Console) -> Path:
    """Write the report of one or more runs: `report.html`, `report.md`, charts and CSV files.

    Args:
        runs: The run directories.
        out: The folder to write to, created if necessary.
        console: Where to print the tables of scores.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: If a path is not a run or has nothing to report, or if a file cannot be
            written.
    """
    found = [RunDirectory(run.resolve()) for run in runs]
    empty = [
        str(run) for run, resolved in zip(runs, found, strict=True) if not _has_content(resolved)
    ]
    if empty:
        raise UserError(
            f"No scores.json and no logs/metrics.csv in {', '.join(empty)}. "
            "Runs lie under runs/NAME/TIMESTAMP."
        )
    pages = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for run in found:
            prefix = f"{run.path.parent.name}-{run.path.name}-" if len(found) > 1 else ""
            pages.append(_run(run, out, prefix, console))
        (out / "report.md").write_text(markdown_page(pages), encoding="utf-8")
        report = out / "report.html"
        report.write_text(html_page(pages), encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write the report to {out}: {error.strerror}.") from None
    console.print(f"Report: {report}")
    return report


def _run(run: RunDirectory, out: Path, prefix: str, console: Console) -> Run:
    sections = [
        Section("Probes", _probes(run, out, prefix, console)),
        Section("What the encoder keeps apart", _maps(run, out, prefix)),
        Section("Training", _training(run, out, prefix)),
        Section("What the decoder writes", [*listened(run.path)]),
        Section(
            "Run",
            [
                sheet
                for sheet in (run_sheet(run.path), data_sheet(run.path), refusal_sheet(run.path))
                if sheet
            ],
        ),
    ]
    return Run(
        f"{run.path.parent.name} · {run.path.name}",
        [section for section in sections if section.blocks],
    )


def _probes(run: RunDirectory, out: Path, prefix: str, console: Console) -> list[Block]:
    if not run.scores.exists():
        return []
    scores = Scores.load(run.scores)
    blocks: list[Block] = []
    for sheet in sheets(scores):
        console.print(rich_table(sheet))
        blocks.append(sheet)
    (out / f"{prefix}scores.csv").write_text(scores_csv(scores), encoding="utf-8")
    baseline = BASELINE_NAME if BASELINE_NAME in scores.encoders else None
    # The baseline is drawn as a line across the bars of the others, so it needs others.
    if scores.encoders != [baseline]:
        picture = plot_scores(scores, out / f"{prefix}scores.png", baseline=baseline)
        blocks.insert(0, Picture(picture, "Scores of every task and encoder"))
    return blocks


def _maps(run: RunDirectory, out: Path, prefix: str) -> list[Block]:
    if not run.scores.exists():
        return []
    scores = Scores.load(run.scores)
    named = " and ".join(map(scores.label, shown_encoders(scores)))
    blocks: list[Block] = []
    if picture := plot_maps(scores, out / f"{prefix}maps.png"):
        blocks.append(
            "Test clips as t-SNE lays them out: neighbours are alike to the encoder; "
            "distances between clusters say nothing."
        )
        blocks.append(Picture(picture, f"Test clips in the space of {named}"))
    for task in scores.tasks[:MAX_CONFUSIONS]:
        if picture := plot_confusions(scores, task, out / f"{prefix}confusion-{task}.png"):
            blocks.append(
                Picture(
                    picture,
                    f"What probes of {named} take for what in {task}, over all seeds and folds",
                )
            )
    return blocks


def _training(run: RunDirectory, out: Path, prefix: str) -> list[Block]:
    if not run.metrics.exists():
        return []
    pictures = []
    if any("loss" in name for name in read_metrics(run.metrics)):
        pictures.append(
            Picture(
                plot_losses(run.metrics, out / f"{prefix}losses.png"),
                "Training and validation loss by domain",
            )
        )
    if learning := plot_learning(run.metrics, out / f"{prefix}learning.png"):
        pictures.append(Picture(learning, "Scores of the probes that ran during training"))
    if speed := plot_speed(run.metrics, out / f"{prefix}speed.png"):
        pictures.append(Picture(speed, "Speed of training and time spent waiting for data"))
    return pictures


def _has_content(run: RunDirectory) -> bool:
    return run.scores.exists() or run.metrics.exists()
