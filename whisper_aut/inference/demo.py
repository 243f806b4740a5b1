"""A local Gradio page to try a run or an encoder on a clip.

The page shows the clip's spectrogram, the text that the decoder writes, and the nearest clips of
some folders, before and after adaptation, with maps of both. `DemoModels` computes all of it
without Gradio.
"""

import html
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import normalize

from whisper_aut.audio.decode import LONG_CLIPS, SAMPLE_RATE_HZ, load_file, load_waveform
from whisper_aut.audio.logmel import HOP_SAMPLES, MAX_SAMPLES, LogMel, mel_frames
from whisper_aut.audio.windows import BATCH_SECONDS
from whisper_aut.data.annotation import DOMAINS, Annotation
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.errors import SkipSample, UserError, require
from whisper_aut.inference.chat import stream, takes_questions
from whisper_aut.inference.embed import embed_paths, is_shards
from whisper_aut.inference.encoder import AudioEncoder
from whisper_aut.inference.search import Neighbour, SearchIndex
from whisper_aut.models.module import AudioTextModule

NEIGHBOURS, PLAYERS = 5, 3


@dataclass
class DemoModels:
    """Computes what the page shows.

    Attributes:
        encoders: encoders by name, the one before adaptation first.
        module: the run with its decoder; None if the page shows only an encoder.
        indexes: for each encoder, the index of clips to search.
    """

    encoders: Mapping[str, AudioEncoder]
    module: AudioTextModule | None = None
    indexes: dict[str, SearchIndex] = field(default_factory=dict)
    notes: dict[str, Annotation] = field(default_factory=dict)

    def index(self, *folders: str, batch_seconds: float = BATCH_SECONDS) -> None:
        """Embed the clips of some folders with every encoder, for `neighbours` and `maps`."""
        for name, encoder in self.encoders.items():
            vectors = embed_paths(encoder, folders, name=name, batch_seconds=batch_seconds)
            self.indexes[name] = SearchIndex(vectors)
        for folder in filter(is_shards, folders):
            for sample in iter_samples(open_index(folder), LONG_CLIPS):
                if isinstance(sample, Sample):
                    self.notes[f"{sample.shard}:{sample.key}"] = sample.annotation

    def group(self, name: str) -> str:
        """Return the domain of a clip of the index; of a file, the name of its folder."""
        return self.notes[name].domain if name in self.notes else Path(name).parent.name

    def audio(self, name: str) -> str | tuple[int, np.ndarray] | None:
        """Return a clip of the index for a player: its path, or rate and int16 samples."""
        if Path(name).is_file():
            return name
        # The name of a tar ends in .tar, .tar.gz or .tgz. Keys may have a colon too.
        shard, *key = re.split(r"(?<=\.tar|r\.gz|\.tgz):", name, maxsplit=1)
        for sample in iter_samples(open_index(shard), LONG_CLIPS):
            if isinstance(sample, Sample) and [sample.key] == key:
                waveform = load_waveform(sample.audio, LONG_CLIPS).clamp(-1, 1)
                return SAMPLE_RATE_HZ, (32_767 * waveform).short().numpy()
        return None

    @property
    def takes_questions(self) -> bool:
        return self.module is not None and takes_questions(self.module.codec)

    def text(self, clip: str, prompt: str) -> Iterator[str]:
        """Yield the text that the decoder writes for an audio file while it grows.

        Args:
            prompt: a question if the decoder takes questions, otherwise a domain.
        """
        if self.module is None:
            raise UserError(
                "An encoder alone writes no text. Open the page on a run: whisper-aut demo "
                "runs/NAME/latest"
            )
        yield from stream(self.module, Path(clip), prompt)

    def neighbours(self, clip: str, k: int = NEIGHBOURS) -> dict[str, list[Neighbour]]:
        """Return the `k` nearest clips of each encoder's index, by the name of the encoder."""
        return {
            name: index.nearest(index.embed(self.encoders[name], [clip])[0], k)
            for name, index in self.indexes.items()
        }

    def maps(self, clip: str) -> Figure:
        """Draw the clip among those of the indexes, and how much adaptation changed each layer.

        A map has the two main directions (PCA) of an encoder's index. The layers are compared by
        the cosine similarity of the clip's mean hidden states before and after adaptation.
        """
        layered = len({(one.layers, one.width) for one in self.encoders.values()}) == 1
        panels = len(self.indexes) + (layered and len(self.encoders) == 2)
        figure = Figure(figsize=(4 * panels, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        for panel, (name, index) in zip(axes, self.indexes.items(), strict=False):
            self._draw_map(panel, name, index, clip)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
        if panels > len(self.indexes):
            layers = range(next(iter(self.encoders.values())).layers + 1)
            states = [one.embed([clip], layers=layers)[0] for one in self.encoders.values()]
            axes[-1].plot(layers, torch.cosine_similarity(*states, dim=-1), "o-")
            axes[-1].set(xlabel="layer", ylabel="cosine similarity", xticks=layers)
            axes[-1].set_title("This clip by layer, before and after")
        return figure

    def _draw_map(self, axes: Any, name: str, index: SearchIndex, clip: str) -> None:
        query = normalize(index.embed(self.encoders[name], [clip])[0].flatten(), dim=0)
        mean = index.units.mean(0)
        points, star = ((units - mean) @ index.main_directions for units in (index.units, query))
        groups = [self.group(clip_name) for clip_name in index.names]
        for number, group in enumerate(sorted(set(groups))):
            mine = points[[own == group for own in groups]]
            label = group.replace("$", r"\$") or "clips"  # a pair of $ would be read as a formula
            axes.scatter(*mine.T, s=14, color=f"C{number}", alpha=0.7, label=label)
        axes.scatter(*star[:, None], s=180, marker="*", color="black", label="this clip")
        axes.set(title=f"Map, {name}", xticks=[], yticks=[])


def spectrogram(clip: str) -> Figure:
    """Draw the log-mel spectrogram of the first 30 s of a clip, in dB below its peak.

    Raises:
        UserError: the clip cannot be used.
    """
    try:
        waveform = load_file(Path(clip), LONG_CLIPS)[:MAX_SAMPLES]
    except SkipSample as skip:
        raise UserError(f"The clip cannot be used: {skip}.") from None
    frames = mel_frames(len(waveform))
    mel = LogMel(80)(waveform)[:frames]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    extent = (0, frames * HOP_SAMPLES / SAMPLE_RATE_HZ, 0, mel.shape[1])
    image = axes.imshow(
        20 * (mel.T - mel.max()), origin="lower", aspect="auto", extent=extent, cmap="viridis"
    )
    axes.set(title="Input of the encoder", xlabel="time / s", ylabel="mel band")
    figure.colorbar(image, ax=axes, label="dB below the peak")
    return figure


def build_page(models: DemoModels, title: str) -> Any:
    """Build the page, a `gradio.Blocks`.

    Raises:
        UserError: Gradio is not installed.
    """
    gradio = _import_gradio()
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        gradio.Markdown("Drop a file or speak. The clip stays on this machine.")
        with gradio.Row():
            clip = gradio.Audio(
                sources=["upload", "microphone"], type="filepath", label="Clip, up to 30 s"
            )
            picture = gradio.Plot(show_label=False)  # the figure has its own title
        arrivals = [clip.upload, clip.stop_recording]
        show = _show_errors(spectrogram)
        gradio.on(arrivals, show, clip, picture, api_name="spectrogram")
        if models.module is not None:
            _add_text_row(gradio, models, clip, arrivals)
        if models.indexes:
            _add_neighbour_row(gradio, models, clip, arrivals)
    return page


def launch_page(page: Any, *, port: int, folders: Sequence[str] = ()) -> str:
    """Serve the page on localhost only, in a thread, and return its URL.

    It may play the clips of `folders`.

    Raises:
        UserError: the port cannot be used.
    """
    gradio = _import_gradio()
    # System fonts, so that the page does not download any.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            allowed_paths=[str(Path(folder).resolve()) for folder in folders],
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
        )
    except OSError as error:
        raise UserError(
            f"The page cannot be served at port {port}: {error} Choose another with --port."
        ) from None
    return str(url)


def _add_text_row(gradio: Any, models: DemoModels, clip: Any, arrivals: list[Any]) -> None:
    with gradio.Row():
        if models.takes_questions:
            prompt = gradio.Textbox("What makes this sound?", label="Question")
        else:
            prompt = gradio.Radio(list(DOMAINS), value="sound", label="Domain of the prompt")
        text = gradio.Textbox(label="The decoder writes", interactive=False)
    write = gradio.Button("Write", variant="primary")
    triggers = [*arrivals, write.click, prompt.submit if models.takes_questions else prompt.input]
    gradio.on(triggers, _show_errors(models.text), [clip, prompt], text, api_name="text")


def _add_neighbour_row(gradio: Any, models: DemoModels, clip: Any, arrivals: list[Any]) -> None:
    button = gradio.Button("Nearest clips and maps")
    outputs = []
    with gradio.Row():
        for name in models.indexes:
            with gradio.Column():
                headers = ["cosine", "domain", "text", "clip"]
                outputs.append(
                    gradio.Dataframe(headers=headers, label=name, interactive=False, wrap=True)
                )
                outputs += [
                    gradio.Audio(label=f"{name}, {rank}", interactive=False, visible=False)
                    for rank in range(1, PLAYERS + 1)
                ]
    outputs.append(gradio.Plot(show_label=False))

    def show(path: str) -> list[Any]:
        cells: list[Any] = []
        for found in models.neighbours(path).values():
            notes = [models.notes.get(near.name) for near in found]
            cells.append(
                [
                    [
                        near.similarity,
                        models.group(near.name),
                        note.text if note else "",
                        Path(near.name).name,
                    ]
                    for near, note in zip(found, notes, strict=True)
                ]
            )
            played = [models.audio(near.name) for near in found[:PLAYERS]]
            cells += [gradio.Audio(value=one, visible=one is not None) for one in played]
            cells += [gradio.Audio(value=None, visible=False)] * (PLAYERS - len(played))
        return [*cells, models.maps(path)]

    gradio.on([*arrivals, button.click], _show_errors(show), clip, outputs, api_name="neighbours")


def _show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a callback so that the page shows a `UserError`, or a missing clip, as a message."""

    def streamed(clip: str | None, *arguments: Any) -> Iterator[Any]:
        gradio = _import_gradio()
        if not clip:
            raise gradio.Error("Record or upload a clip first.", print_exception=False)
        try:
            if inspect.isgeneratorfunction(function):
                yield from function(clip, *arguments)
            else:
                yield function(clip, *arguments)
        except UserError as error:
            raise gradio.Error(html.escape(str(error)), print_exception=False) from None

    return streamed


def _import_gradio() -> Any:
    require("gradio")
    import gradio

    return gradio
