"""A local Gradio page to try a run or an encoder on a clip.

The page shows the clip's spectrogram, the text that the decoder writes, and the nearest clips of a
folder before and after adaptation. `DemoModels` computes all of it without Gradio.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from whisper_aut.audio.decode import LONG_CLIPS, SAMPLE_RATE_HZ, load_file
from whisper_aut.audio.logmel import HOP_SAMPLES, MAX_SAMPLES, LogMel, mel_frames
from whisper_aut.audio.windows import BATCH_SECONDS
from whisper_aut.data.annotation import DOMAINS
from whisper_aut.errors import SkipSample, UserError, require
from whisper_aut.inference.chat import answer, describe, takes_questions
from whisper_aut.inference.embed import embed_paths
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

    def index(self, folder: str, batch_seconds: float = BATCH_SECONDS) -> None:
        """Embed the clips of a folder with every encoder, for `neighbours` to search."""
        for name, encoder in self.encoders.items():
            vectors = embed_paths(encoder, [folder], name=name, batch_seconds=batch_seconds)
            self.indexes[name] = SearchIndex(vectors)

    @property
    def takes_questions(self) -> bool:
        return self.module is not None and takes_questions(self.module.codec)

    def text(self, clip: str, prompt: str) -> str:
        """Return the text that the decoder writes for an audio file.

        Args:
            prompt: a question if the decoder takes questions, otherwise a domain.
        """
        if self.module is None:
            raise UserError(
                "An encoder alone writes no text. Open the page on a run: whisper-aut demo "
                "runs/NAME/latest"
            )
        if self.takes_questions:
            return answer(self.module, Path(clip), prompt)
        return describe(self.module, Path(clip), domain=prompt)

    def neighbours(self, clip: str, k: int = NEIGHBOURS) -> dict[str, list[Neighbour]]:
        """Return the `k` nearest clips of each encoder's index, by the name of the encoder."""
        return {
            name: index.nearest(index.embed(self.encoders[name], [clip])[0], k)
            for name, index in self.indexes.items()
        }


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
        with gradio.Row():
            clip = gradio.Audio(
                sources=["upload", "microphone"], type="filepath", label="Clip, up to 30 s"
            )
            picture = gradio.Plot(show_label=False)  # the figure has its own title
        clip.change(_show_errors(spectrogram), clip, picture, api_name="spectrogram")
        if models.module is not None:
            _add_text_row(gradio, models, clip)
        if models.indexes:
            _add_neighbour_row(gradio, models, clip)
    return page


def launch_page(page: Any, *, port: int, folders: Sequence[str] = ()) -> str:
    """Serve the page on localhost only, in a thread, and return its URL.

    Args:
        folders: folders whose clips the page may play.

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


def _add_text_row(gradio: Any, models: DemoModels, clip: Any) -> None:
    with gradio.Row():
        if models.takes_questions:
            prompt = gradio.Textbox("What makes this sound?", label="Question")
        else:
            prompt = gradio.Radio(list(DOMAINS), value="sound", label="Domain of the prompt")
        text = gradio.Textbox(label="The decoder writes", interactive=False)
    gradio.Button("Write", variant="primary").click(
        _show_errors(models.text), [clip, prompt], text, api_name="text"
    )


def _add_neighbour_row(gradio: Any, models: DemoModels, clip: Any) -> None:
    button = gradio.Button("Nearest clips")
    outputs = []
    with gradio.Row():
        for name in models.indexes:
            with gradio.Column():
                outputs.append(
                    gradio.Dataframe(headers=["clip", "cosine"], label=name, interactive=False)
                )
                outputs += [
                    gradio.Audio(label=f"{name}, {rank}", interactive=False, visible=False)
                    for rank in range(1, PLAYERS + 1)
                ]

    def show(path: str) -> list[Any]:
        cells: list[Any] = []
        for found in models.neighbours(path).values():
            cells.append([[Path(clip.name).name, clip.similarity] for clip in found])
            files = [clip.name for clip in found[:PLAYERS] if Path(clip.name).is_file()]
            cells += [gradio.Audio(value=file, visible=True) for file in files]
            cells += [gradio.Audio(value=None, visible=False)] * (PLAYERS - len(files))
        return cells

    button.click(_show_errors(show), clip, outputs, api_name="neighbours")


def _show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a callback so that the page shows a `UserError`, or a missing clip, as a message."""

    def wrapped(clip: str | None, *arguments: Any) -> Any:
        gradio = _import_gradio()
        if not clip:
            raise gradio.Error("Record or upload a clip first.", print_exception=False)
        try:
            return function(clip, *arguments)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return wrapped


def _import_gradio() -> Any:
    require("gradio")
    import gradio

    return gradio
