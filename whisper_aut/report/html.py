"""Build the report of one or more runs as Markdown and as a self-contained HTML page.

The HTML page embeds its pictures and audio and fetches nothing. Its only script sorts tables.
Contrast and text sizes follow WCAG 2.2 AA.
"""

import io
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.image import imsave
from rich.console import Console

from whisper_aut.audio.decode import SAMPLE_RATE_HZ, ClipLimits, load_waveform
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.data.annotation import read_lines
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.probes.encoders import BASELINE_NAME
from whisper_aut.probes.results import Scores
from whisper_aut.report.leaderboard import (
    join_scores,
    leaderboard_csv,
    leaderboard_tables,
    recipe_table,
)
from whisper_aut.report.plots import (
    compared_encoders,
    plot_confusions,
    plot_few_shot,
    plot_layers,
    plot_learning,
    plot_losses,
    plot_maps,
    plot_scores,
    plot_speed,
    read_metrics,
)
from whisper_aut.report.tables import BLANK, Table, class_tables, score_tables, scores_csv
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.utils import parse_json, read_json, write_text

# Files of `whisper-aut probe` next to `scores.json`.
LAYERS, LAYER_WEIGHTS, FEW_SHOT = "layers.json", "layer_weights.json", "few_shot.json"
Name = tuple[str, str]  # of a clip: folder of its shard, and key
MAX_CONFUSIONS = 6  # tasks with a confusion matrix
MAX_TEXTS_PER_TASK, MAX_TEXTS = 2, 18
MAX_SEARCHED_SAMPLES = 20_000  # in each validation source
MAX_PLAYED_SECONDS = 30
MEL_BINS = 80
# Of `samples.jsonl`.
TEXT_FIELDS = ("domain", "task", "source", "key", "reference", "generated")
# Metric → its title, the factor to print it with, and its decimals.
THROUGHPUT = {
    "throughput/audio_seconds_per_second": ("audio-seconds per second", 1, 1),
    "throughput/clips_per_second": ("clips per second", 1, 1),
    "throughput/tokens_per_second": ("tokens per second", 1, 0),
    "throughput/data_wait_fraction": ("waiting for data, % of the time", 100, 1),
    "throughput/padding_fraction": ("padding, % of the frames", 100, 1),
    "throughput/teraflops": ("model TFLOP/s", 1, 3),
    "throughput/mfu": ("MFU, %", 100, 1),
    "throughput/peak_memory_gib": ("peak memory, GiB", 1, 2),
}


@dataclass(frozen=True)
class Figure:
    """A PNG file and its caption, which is also its alternative text for screen readers."""

    path: Path
    caption: str


@dataclass(frozen=True)
class GeneratedText:
    """A validation clip and the text that the decoder generated for it.

    Attributes:
        ogg: The clip as Ogg Vorbis; empty if it was not found.
        spectrogram: Its log-mel spectrogram as PNG; empty if it was not found.
    """

    domain: str
    task: str
    key: str
    reference: str
    generated: str
    source: str
    seconds: float | None = None
    ogg: bytes = b""
    spectrogram: bytes = b""

    @property
    def title(self) -> str:
        parts = [self.domain, self.task or "text", self.key]
        parts += [] if self.seconds is None else [f"{self.seconds:.1f} s"]
        return " · ".join(parts)


@dataclass(frozen=True)
class Section:
    """A heading and what is below it, in this order."""

    title: str
    note: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[GeneratedText] = ()

    def __bool__(self) -> bool:
        return bool(self.figures or self.tables or self.texts)


def build_report(runs: Sequence[Path], out: Path, console: Console) -> Path:
    """Write the report of run directories to `out`: `report.html` (whose path is returned),
    `report.md`, charts and CSV files. Print the tables of scores.

    Raises:
        UserError: A path is not a run or has nothing to report, or a file cannot be written.
    """
    found = [RunDirectory(run.resolve()) for run in runs]
    empty = [
        str(path)
        for path, run in zip(runs, found, strict=True)
        if not run.scores.exists() and not run.metrics.exists()
    ]
    if empty:
        raise UserError(
            f"There is no scores.json and no logs/metrics.csv in {', '.join(empty)}. "
            "Give a run directory, runs/NAME/TIMESTAMP."
        )
    reports = []
    for run in found:
        names = run.path.parent.name, run.path.name
        earlier = sum(title == " · ".join(names) for title, _ in reports)
        prefix = "-".join([*names, *([str(earlier + 1)] if earlier else []), ""])
        sections = _report_run(run, out, prefix if len(found) > 1 else "", console)
        reports.append((" · ".join(names), sections))
    with_scores = [run.scores for run in found if run.scores.exists()]
    if len(with_scores) > 1:
        sections = [
            Section(f"Probes: {kind}", " ".join(warnings), tables=leaderboard_tables(scores))
            for kind, (scores, warnings) in join_scores(with_scores).items()
        ]
        reports.insert(0, ("All runs", sections))
    write_text(out / "report.md", render(reports, "report.md"))
    write_text(out / "report.html", render(reports, "report.html"))
    console.print(f"Report: {out / 'report.html'}")
    return out / "report.html"


def render(runs: Sequence[tuple[str, Sequence[Section]]], template: str) -> str:
    """Render the titles and sections of runs with `report.html` or `report.md` of `templates`."""
    environment = Environment(
        loader=PackageLoader("whisper_aut.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = lambda content, mime_type: (
        f"data:{mime_type};base64,{b64encode(content).decode()}"
    )
    text = environment.get_template(template).render(runs=runs)
    return text.encode(errors="backslashreplace").decode()  # names in tars may not be UTF-8


def _report_run(run: RunDirectory, out: Path, prefix: str, console: Console) -> list[Section]:
    sections = []
    if run.scores.exists():
        scores = Scores.load(run.scores)
        tables = score_tables(scores)
        for table in tables:
            console.print(table.to_rich())
        write_text(out / f"{prefix}scores.csv", scores_csv(scores))
        sections.append(Section("Probes", figures=_draw_scores(scores, out, prefix), tables=tables))
        sections.append(_section_of_maps(scores, out, prefix))
        sections.append(Section("Classes", tables=class_tables(scores, run.predictions)))
        sections.append(_section_of_curves(scores, run.path, out, prefix))
    if run.metrics.exists():
        sections.append(Section("Training", figures=_draw_training(run, out, prefix)))
    sections.append(Section("Generated texts", texts=generated_texts(run.path)))
    tables = [run_table(run.path), data_table(run.path), skipped_table(run.path)]
    sections.append(Section("Run", tables=[table for table in tables if table]))
    return [section for section in sections if section]


def _section_of_curves(scores: Scores, run: Path, out: Path, prefix: str) -> Section:
    """Draw scores by layer and by number of training clips, if the run has them.

    Those that an earlier run of other encoders left in the folder are not drawn.
    """
    figures, stored = [], {}
    own = {cost.fingerprint for cost in scores.costs.values()}
    for name in (LAYERS, LAYER_WEIGHTS, FEW_SHOT):
        found = Scores.load(run / name) if (run / name).exists() else None
        if found and found.entries and all(c.fingerprint in own for c in found.costs.values()):
            stored[name] = found
    if LAYERS in stored:
        path = plot_layers(stored[LAYERS], stored.get(LAYER_WEIGHTS), out / f"{prefix}layers.png")
        kinds = " and ".join(dict.fromkeys(entry.kind for entry in stored[LAYERS].entries))
        caption = f"Scores of {kinds} probes on each layer, with the 95 % interval of the average"
        figures.append(Figure(path, caption))
    if FEW_SHOT in stored:
        path = plot_few_shot(stored[FEW_SHOT], out / f"{prefix}few_shot.png")
        caption = "Scores with few training clips per class, ± standard deviation over draws"
        figures.append(Figure(path, caption))
    return Section("Layers and few clips", figures=figures)


def build_leaderboard(
    paths: Sequence[Path], out: Path, console: Console, recipes: Sequence[str], against: str
) -> Path:
    """Write `leaderboard.html` (whose path is returned), `.md` and `.csv` to `out`, and print it.

    The `paths` are files of scores, or folders with a `scores.json`. Recipes, whose trainings are
    the encoders NAME-0, NAME-1 and so on, are compared with the encoder or recipe `against`.

    Raises:
        UserError: a file holds no scores, a name is unknown, or a file cannot be written.
    """
    boards = join_scores([RunDirectory(path).scores if path.is_dir() else path for path in paths])
    sections = []
    for kind, (scores, warnings) in boards.items():
        tables = leaderboard_tables(scores)
        tables += [recipe_table(scores, recipe, against) for recipe in recipes]
        sections.append(Section(f"Probes: {kind}", " ".join(warnings), tables=tables))
        for table in tables:
            console.print(table.to_rich())
        for warning in warnings:
            console.print(f"Warning: {warning}", highlight=False)
    write_text(
        out / "leaderboard.csv", leaderboard_csv({kind: one for kind, (one, _) in boards.items()})
    )
    for name in ("md", "html"):
        write_text(
            out / f"leaderboard.{name}", render([("Leaderboard", sections)], f"report.{name}")
        )
    console.print(f"Leaderboard: {out / 'leaderboard.html'}")
    return out / "leaderboard.html"


def _draw_scores(scores: Scores, out: Path, prefix: str) -> list[Figure]:
    baseline = BASELINE_NAME if BASELINE_NAME in scores.encoders else None
    if scores.encoders == [baseline]:  # drawn as a line across the bars of the others
        return []
    path = plot_scores(scores, out / f"{prefix}scores.png", baseline=baseline)
    return [Figure(path, "Scores of every task and encoder")]


def _section_of_maps(scores: Scores, out: Path, prefix: str) -> Section:
    encoders = " and ".join(map(scores.label, compared_encoders(scores)))
    figures, note = [], ""
    if path := plot_maps(scores, out / f"{prefix}maps.png"):
        note = (
            "Test clips projected with t-SNE. Neighbours have similar embeddings; distances "
            "between clusters have no meaning."
        )
        figures.append(Figure(path, f"Test clips, embedded by {encoders}"))
    for task in scores.tasks[:MAX_CONFUSIONS]:
        name = f"{prefix}confusion-{task.replace('/', '_')}.png"
        if path := plot_confusions(scores, task, out / name):
            caption = f"Confusion matrix of {task} for {encoders}, over all seeds and folds"
            figures.append(Figure(path, caption))
    return Section("Embeddings and confusions", note, figures)


def _draw_training(run: RunDirectory, out: Path, prefix: str) -> list[Figure]:
    figures = []
    if any("loss" in name for name in read_metrics(run.metrics)):
        path = plot_losses(run.metrics, out / f"{prefix}losses.png")
        figures.append(Figure(path, "Training and validation loss by domain"))
    if path := plot_learning(run.metrics, out / f"{prefix}learning.png"):
        figures.append(Figure(path, "Scores of the probes that ran during training"))
    if path := plot_speed(run.metrics, out / f"{prefix}speed.png"):
        figures.append(Figure(path, "Training speed and time spent waiting for data"))
    return figures


def run_table(run: Path) -> Table | None:
    """Return machine, packages and throughput of a run; None if it recorded no environment."""
    environment = read_json(run / "environment.json", default={})
    done = read_json(run / "done.json", default={})
    if not environment:
        return None
    packages = environment.get("packages", {}) | {"Python": environment.get("python", "")}
    pretrained = environment.get("pretrained", {})
    decoder = {name: value for name, value in environment.get("decoder", {}).items() if value}
    rows = [
        ("command", " ".join(environment.get("command", []))),
        ("revision", environment.get("git", "")),
        ("machine", f"{environment.get('machine', '')}, {environment.get('cpus', '?')} cores"),
        ("GPUs", ", ".join(environment.get("gpus", [])) or "none"),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("pretrained", " at ".join(str(value) for value in pretrained.values() if value)),
        ("decoder", ", ".join(f"{name} {value}" for name, value in decoder.items())),
        ("steps", str(done.get("steps", f"stopped before {environment.get('steps', '?')}"))),
    ]
    metrics = done.get("metrics", {})
    for name, (title, scale, digits) in THROUGHPUT.items():
        if name in metrics:
            rows.append((title, f"{scale * metrics[name]:,.{digits}f}"))
    return Table("Environment and speed", ("", ""), tuple(row for row in rows if row[1]), 2)


def data_table(run: Path) -> Table | None:
    """Return the training sources with their requested and actual weights; None without any."""
    sources = read_json(run / "environment.json", default={}).get("data", [])
    epochs = read_json(run / "done.json", default={}).get("sources", {})
    if not sources:
        return None
    requested = [source.get("weight", 0) for source in sources]
    drawn = [epochs.get(source.get("root"), 0) * source.get("clips", 0) for source in sources]
    rows = []
    for source, weight, clips in zip(sources, requested, drawn, strict=True):
        root = source.get("root", "")
        rows.append(
            (
                root,
                source.get("domain", ""),
                ", ".join(filter(None, source.get("licences", ()))) or BLANK,
                f"{source.get('clips', 0):,}",
                f"{source.get('seconds', 0) / 3600:,.2f}",
                _percent_of(weight, sum(requested)),
                _percent_of(clips, sum(drawn)),
                f"{epochs[root]:.2f}" if root in epochs else BLANK,
            )
        )
    columns = ("source", "domain", "licences", "clips", "hours", "requested (%)", "drawn (%)")
    return Table(
        "Training data",
        (*columns, "epochs"),
        tuple(rows),
        text_columns=3,
        caption="Requested and drawn: percentage of the clips in the mixture.",
    )


def _percent_of(part: float, total: float) -> str:
    return f"{100 * part / total:.1f}" if total else BLANK


def skipped_table(run: Path) -> Table | None:
    """Return the number of skipped samples by source and reason; None if there were none."""
    skipped = read_json(run / "done.json", default={}).get("skipped", {})
    rows = tuple(
        (source, reason, f"{count:,}")
        for source, reasons in skipped.items()
        for reason, count in reasons.items()
    )
    if not rows:
        return None
    caption = "Listed one by one in `ledger.jsonl`, and in `ledger-rankN.jsonl` for other ranks."
    return Table("Skipped samples", ("source", "reason", "samples"), rows, 2, caption)


def generated_texts(run: Path) -> list[GeneratedText]:
    """Return the texts generated at a run's last validation, with their clips.

    Clips are missing if the validation shards have moved since.
    """
    texts = last_samples(run / "samples.jsonl")
    names = [(text.source, text.key) for text in texts]
    found = dict(_find_clips(run / "config.yaml", set(names)))
    return [
        _add_audio(text, found[name]) if name in found else text
        for name, text in zip(names, texts, strict=True)
    ]


def last_samples(samples: Path) -> list[GeneratedText]:
    """Return texts generated at the last validation, at most `MAX_TEXTS_PER_TASK` of each task.

    There are none if the `samples.jsonl` of the run cannot be read.
    """
    try:
        lines = read_lines(samples)
    except (OSError, UnicodeDecodeError):
        return []
    by_step: dict[int, list[GeneratedText]] = defaultdict(list)
    for line in lines:
        try:
            values = parse_json(line)
            text = {name: str(values.get(name, "")) for name in TEXT_FIELDS}
            by_step[int(values["step"])].append(GeneratedText(**text))  # pyright: ignore[reportArgumentType]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue  # a killed run may leave an unfinished line
    by_task: dict[tuple[str, str], list[GeneratedText]] = defaultdict(list)
    for text in by_step[max(by_step)] if by_step else []:
        by_task[text.domain, text.task].append(text)
    chosen = [text for texts in by_task.values() for text in texts[:MAX_TEXTS_PER_TASK]]
    return chosen[:MAX_TEXTS]


def _find_clips(config: Path, names: set[Name]) -> Iterator[tuple[Name, np.ndarray]]:
    """Yield the name and waveform of the validation clips with these names."""
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        folders = [str(one["path"]) for one in values["data"]["valid"]]
    except (OSError, yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError):
        return
    for folder in folders:
        try:
            for number, sample in enumerate(iter_samples(open_index(folder), ClipLimits())):
                if not names or number == MAX_SEARCHED_SAMPLES:
                    break
                name = sample.shard.rpartition("/")[0], sample.key
                if isinstance(sample, Sample) and name in names:
                    names = names - {name}
                    with suppress(SkipSample):
                        yield name, load_waveform(sample.audio, ClipLimits()).numpy()
        except (UserError, OSError):
            continue  # if the shards have moved, the texts are shown without audio


def _add_audio(text: GeneratedText, waveform: np.ndarray) -> GeneratedText:
    peak = max(float(np.abs(waveform).max(initial=0)), 1e-4)
    played = waveform[: MAX_PLAYED_SECONDS * SAMPLE_RATE_HZ] * min(1.0, 0.95 / peak)
    ogg, png = io.BytesIO(), io.BytesIO()
    soundfile.write(ogg, played, SAMPLE_RATE_HZ, format="OGG", subtype="VORBIS")
    mel = LogMel(MEL_BINS)(torch.from_numpy(waveform))[: mel_frames(len(waveform))]
    # One pixel per mel bin and frame.
    imsave(png, mel.T.flip(0).numpy(), cmap="magma", format="png")
    seconds = len(waveform) / SAMPLE_RATE_HZ
    return replace(text, seconds=seconds, ogg=ogg.getvalue(), spectrogram=png.getvalue())
