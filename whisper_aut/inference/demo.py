"""A local Gradio page to try a run or an encoder on a clip.

The page shows the clip's spectrogram, the text that the decoder writes, and the nearest clips of a
folder before and after adaptation. `DemoModels` computes all of it without Gradio; the rest of the
module is layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from whisper_aut.audio.decode import LONG_CLIPS, SAMPLE_RATE_HZ, load_file
from whisper_aut.audio.logmel import HOP_SAMPLES, MAX_SAMPLES, LogMel, mel_frames
from whisper_aut.audio.windows import BATCH_SECONDS
from whisper_aut.data.annotation import DOMAINS
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.inference.chat import Askable, answer, describe
from whisper_aut.inference.embed import embed_paths
from whisper_aut.inference.encoder import AudioEncoder
from whisper_aut.inference.search import Neighbour, SearchIndex
from whisper_aut.models.module import AudioTextModule

NEIGHBOURS, PLAYERS = 5, 3
# Plain names, so that the page does not download fonts.
FONTS = ["system-ui", "sans-serif"]


@dataclass
class DemoModels:
    """Computes what the page shows.

    Attributes:
        encoders: Encoders by name, the one before adaptation first.
        module: The run with its decoder; None if the page shows only an encoder.
        indexes: For each encoder, the index of clips to search.
    """

    encoders: Mapping[str, AudioEncoder]
    module: AudioTextModule | None = None
    indexes: dict[str, SearchIndex] = field(default_factory=dict)

    def index(self, folder: str, batch_seconds: float = BATCH_SECONDS) -> None:
        """Embed the clips of a folder with every encoder, for `neighbours` to search.

        Raises:
            UserError: If the folder has no usable clips.
        """
        for name, encoder in self.encoders.items():
            embedded = embed_paths(encoder, [folder], name=name, batch_seconds=batch_seconds)
            self.indexes[name] = SearchIndex(embedded)

    @property
    def answers_questions(self) -> bool:
        return self.module is not None and isinstance(self.module.codec, Askable)

    def text(self, clip: str, asked: str) -> str:
        """Return the text that the decoder writes for a clip.

        Args:
            clip: The audio file.
            asked: The question if the decoder takes questions, otherwise the domain of the clip.

        Raises:
            UserError: If there is no decoder, or if the clip cannot be used.
        """
        if self.module is None:
            raise UserError(
                "An encoder alone writes nothing. "
                "Open the page on a run: whisper-aut demo runs/NAME/latest"
            )
        if self.answers_questions:
            return answer(self.module, Path(clip), asked)
        return describe(self.module, Path(clip), domain=asked)

    def neighbours(self, clip: str, k: int = NEIGHBOURS) -> dict[str, list[Neighbour]]:
        """Return the `k` nearest clips of each encoder's index, by the name of the encoder.

        Raises:
            UserError: If the clip cannot be used.
        """
        return {
            name: index.nearest(index.embed(self.encoders[name], [clip])[0], k)
            for name, index in self.indexes.items()
        }


def spectrogram(clip: str) -> Figure:
    """Draw the log-mel spectrogram of the first 30 s of a clip, in dB below its peak.

    Raises:
        UserError: If the clip cannot be used.
    """
    try:
        waveform = load_file(Path(clip), LONG_CLIPS)[:MAX_SAMPLES]
    except SkipSample as refused:
        raise UserError(f"The clip cannot be used: {refused}.") from None
    frames = mel_frames(len(waveform))
    mel = LogMel(80)(waveform)[:frames]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    extent = (0, frames * HOP_SAMPLES / SAMPLE_RATE_HZ, 0, mel.shape[1])
    image = axes.imshow(
        20 * (mel.T - mel.max()), origin="lower", aspect="auto", extent=extent, cmap="viridis"
    )
    axes.set(title="What the encoder hears", xlabel="time / s", ylabel="mel band")
    figure.colorbar(image, ax=axes, label="dB below the peak")
    return figure


def build_page(listener: DemoModels, title: str) -> Any:
    """Build the page.

    Returns:
        A `gradio.Blocks`.

    Raises:
        UserError: If Gradio is not installed.
    """
    gradio = _gradio()
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            clip = gradio.Audio(
                sources=["upload", "microphone"], type="filepath", label="Clip, up to 30 s"
            )
            picture = gradio.Plot(show_label=False)  # the figure has its own title
        clip.change(_told(spectrogram), clip, picture, api_name="spectrogram")
        if listener.module is not None:
            _text_row(gradio, listener, clip)
        if listener.indexes:
            _neighbour_row(gradio, listener, clip)
    return page


def launch_page(page: Any, *, port: int, folders: Sequence[str] = (), wait: bool = True) -> str:
    """Serve the page on localhost only.

    Args:
        page: What `build_page` returned.
        port: The port to serve at.
        folders: Folders whose clips the page may play.
        wait: Block until the server is interrupted.

    Returns:
        The URL of the page.

    Raises:
        UserError: If the port cannot be used.
    """
    gradio = _gradio()
    theme = gradio.themes.Default(font=FONTS, font_mono=["monospace"])
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            allowed_paths=[str(Path(folder).resolve()) for folder in folders],
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
        )
    except OSError as error:
        raise UserError(
            f"The page cannot be served at port {port}: {error} Name another with --port."
        ) from None
    if wait:
        page.block_thread()
    return str(address)


def _text_row(gradio: Any, listener: DemoModels, clip: Any) -> None:
    with gradio.Row():
        if listener.answers_questions:
            asked = gradio.Textbox("What makes this sound?", label="Question")
        else:
            asked = gradio.Radio(list(DOMAINS), value="sound", label="Write as for")
        written = gradio.Textbox(label="The decoder writes", interactive=False)
    gradio.Button("Write", variant="primary").click(
        _told(listener.text), [clip, asked], written, api_name="text"
    )


def _neighbour_row(gradio: Any, listener: DemoModels, clip: Any) -> None:
    button = gradio.Button("Nearest clips")
    outputs = []
    with gradio.Row():
        for name in listener.indexes:
            with gradio.Column():
                outputs.append(
                    gradio.Dataframe(headers=["clip", "cosine"], label=name, interactive=False)
                )
                players = (
                    gradio.Audio(label=f"{name}, {place + 1}", interactive=False, visible=False)
                    for place in range(PLAYERS)
                )
                outputs += players

    def show(path: str) -> list[Any]:
        cells: list[Any] = []
        for found in listener.neighbours(path).values():
            cells.append([[Path(one.name).name, one.similarity] for one in found])
            files = [one.name for one in found[:PLAYERS] if Path(one.name).is_file()]
            cells += [gradio.Audio(value=file, visible=True) for file in files]
            cells += [gradio.Audio(value=None, visible=False)] * (PLAYERS - len(files))
        return cells

    button.click(_told(show), clip, outputs, api_name="neighbours")


def _told(function: Any) -> Any:
    """Wrap a callback so that the page shows a `UserError`, or a missing clip, as a message."""

    def wrapped(clip: str | None, *rest: Any) -> Any:
        if not clip:
            raise _gradio().Error("Record or upload a clip first.", print_exception=False)
        try:
            return function(clip, *rest)
        except UserError as error:
            raise _gradio().Error(str(error), print_exception=False) from None

    return wrapped


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise UserError("The page needs Gradio: pip install 'whisper-aut[demo]'.") from None
    return gradio
