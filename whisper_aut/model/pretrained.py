"""A trained encoder for its users: audio in, frames or vectors out.

In: a hub id or directory in Hugging Face's Whisper format, and audio files or arrays of any rate and length. Out: one `[T, D]` tensor a
clip, its valid frames only, or one vector a clip. Next: probes, an index to search in, a language model. `whisper_aut.load_encoder` is this
module's function.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from whisper_aut.corpora.audio import LONG_CLIPS
from whisper_aut.data.logmel import WINDOW_SECONDS, LogMel, mel_frames
from whisper_aut.data.waveform import SAMPLE_RATE_HZ, load_file, to_mono_16k
from whisper_aut.errors import SampleRefused, UserError, nearest
from whisper_aut.model.encoder import (
    PADDINGS,
    RELEASED_PADDING,
    TRAINED_PADDING,
    PackedEncoder,
    Padding,
)
from whisper_aut.model.seeding import seeded
from whisper_aut.model.start import Start, load_whisper_encoder
from whisper_aut.model.windows import (
    BATCH_SECONDS,
    batches_by_seconds,
    cut_windows,
    join_windows,
    pooling_named,
)

Audio: TypeAlias = np.ndarray | Tensor | str | os.PathLike[str]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECODERS = min(8, os.cpu_count() or 1)
CLIPS_AT_ONCE = 64  # what `embed` holds in memory: so many clips and their frames


class AudioEncoder(nn.Module):
    """Log-mel features and a packed encoder, in eval mode.

    Args:
        encoder: the encoder to run.

    Examples:
        >>> encoder = load_encoder("runs/aut_tiny/latest/export/encoder")
        >>> frames = encoder.encode(["clip.wav"])  # a frame every 20 ms: clip.wav is one second long
        >>> [tuple(clip.shape) for clip in frames] == [(50, encoder.width)]
        True
    """

    def __init__(self, encoder: PackedEncoder):
        super().__init__()
        self.encoder = encoder
        self.logmel = LogMel(encoder.num_mel_bins)
        self.eval()

    @property
    def width(self) -> int:
        """D, the width of a frame."""
        return self.encoder.width

    @property
    def padding(self) -> str:
        return self.encoder.padding

    @property
    def layers(self) -> int:
        """How many layers the encoder has."""
        return len(self.encoder.whisper.layers)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> str:
        """What it runs in: a key of `DTYPES`."""
        found = next(self.parameters()).dtype
        return next(name for name, dtype in DTYPES.items() if dtype == found)

    @torch.inference_mode()
    def encode(
        self,
        audio: Sequence[Audio],
        sample_rate_hz: int | None = None,
        layers: Sequence[int] = (),
        *,
        batch_seconds: float = BATCH_SECONDS,
    ) -> list[Tensor]:
        """Encode clips of any length; beyond 30 s they are heard in windows that overlap by 2 s.

        Args:
            audio: arrays `[S]` or `[S, channels]` of one sampling rate, or paths of files, which know their own.
            sample_rate_hz: of arrays.
            layers: give these hidden states in place of the output, numbered as Hugging Face numbers them: 0 is what enters the
                first layer, the last one is the output.
            batch_seconds: how much audio runs at once; the memory that encoding takes grows with it.

        Returns:
            Per clip its valid frames `[T, D]` (20 ms each), or `[layers, T, D]`, float32 on the CPU.

        Raises:
            UserError: a file that cannot be used, arrays without a rate, or a layer that the encoder does not have.
            ValueError: an array is empty, of another shape, or not finite.

        Examples:
            >>> chirp = np.sin(np.linspace(0, 3000, 8000, dtype=np.float32) ** 1.2)
            >>> encoder = load_encoder("runs/aut_tiny/latest/export/encoder")
            >>> encoder.encode([chirp], sample_rate_hz=8_000, layers=[0, 1])[0].shape[:2]  # layers, frames
            torch.Size([2, 50])
        """
        self._check_layers(layers)
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:
            clips = list(
                pool.map(
                    partial(_waveform, sample_rate_hz=sample_rate_hz),
                    _listed(audio),
                    range(len(audio)),
                )
            )
        windows = [cut_windows(clip) for clip in clips]
        flat = [window for listed in windows for window in listed]
        padded = self.padding == "30s"
        seconds = [WINDOW_SECONDS if padded else len(window) / SAMPLE_RATE_HZ for window in flat]
        encoded: list[Tensor] = []
        for batch in batches_by_seconds(seconds, batch_seconds):
            encoded += self._encode([flat[place] for place in batch], layers)
        frames = iter(encoded)
        return [join_windows([next(frames) for _ in listed]) for listed in windows]

    def embed(
        self,
        audio: Sequence[Audio],
        sample_rate_hz: int | None = None,
        *,
        pooling: str = "mean",
        layers: Sequence[int] = (),
        batch_seconds: float = BATCH_SECONDS,
    ) -> Tensor:
        """Encode clips and pool the frames of each: `[B, D']`, or `[B, layers, D']` where layers are given.

        Args:
            pooling: `mean`, or `mean_std` for mean and deviation, twice as wide.

        Raises:
            UserError, ValueError: see `encode`.

        Examples:
            >>> encoder = load_encoder("runs/aut_tiny/latest/export/encoder")
            >>> encoder.embed(["clip.wav", "clip.wav"], pooling="mean_std").shape == (2, 2 * encoder.width)
            True
        """
        pool, clips = pooling_named(pooling), _listed(audio)
        rows = []
        for start in range(0, len(clips), CLIPS_AT_ONCE):
            group = clips[start : start + CLIPS_AT_ONCE]
            rows += [
                pool(frames)
                for frames in self.encode(
                    group, sample_rate_hz, layers, batch_seconds=batch_seconds
                )
            ]
        return torch.stack(rows) if rows else torch.empty(0, self.width)

    def _encode(self, waveforms: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
        """Encode `[S]` of at most 30 s each, all at once."""
        mel = torch.cat([self.logmel(waveform.to(self.device)) for waveform in waveforms])
        lengths = [mel_frames(len(waveform)) for waveform in waveforms]
        if not layers:
            frames = self.encoder(mel, lengths)
            return replace(
                frames, values=frames.values.float().cpu()
            ).valid()  # one copy for all clips
        with hidden_states(self.encoder) as states:
            frames = self.encoder(mel, lengths)
        states.append(frames.values)
        per_layer = [
            replace(frames, values=states[layer].float().cpu()).valid() for layer in layers
        ]
        return [torch.stack(clip) for clip in zip(*per_layer, strict=True)]

    def _check_layers(self, layers: Sequence[int]) -> None:
        if any(not 0 <= layer <= self.layers for layer in layers):
            asked = ", ".join(map(str, layers))
            raise UserError(
                f"The encoder has layers 0 (what enters the first) to {self.layers}; asked for: {asked}."
            )

    def fingerprint(self) -> str:
        """Return a hash of weights, padding and precision: what decides the frames."""
        digest = hashlib.sha256(f"{self.padding}{self.dtype}".encode())
        for name, weight in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@contextmanager
def hidden_states(encoder: PackedEncoder) -> Iterator[list[Tensor]]:
    """Collect what enters each layer, packed `[ΣT, D]`, while the encoder runs: the input of its first norm."""
    states: list[Tensor] = []
    norms = cast(list[nn.Module], [layer.self_attn_layer_norm for layer in encoder.whisper.layers])
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for norm in norms
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def load_encoder(
    path_or_hub_id: str | os.PathLike[str],
    *,
    padding: Padding | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    revision: str = "",
    random_init: bool = False,
    seed: int = 0,
) -> AudioEncoder:
    """Load the encoder of a Whisper checkpoint: one exported here, or any of the hub's.

    Args:
        path_or_hub_id: a directory in Hugging Face's format, a run of ours (its exported encoder is taken), or a hub id such as
            `openai/whisper-tiny`; `openai/whisper-tiny@none` states the padding as well.
        padding: `none` runs clips at their own length, `30s` computes what Hugging Face computes. By default an
            encoder runs as it was trained: as its export's `config.json` says, or at `30s` where it
            says nothing, as in every released Whisper.
        device: where it runs; `auto` takes a GPU where there is one.
        dtype: the precision it runs in; `fp32`, `bf16` and `fp16` are short for PyTorch's.
        revision: branch, tag or commit on the hub.
        random_init: keep the architecture and draw new weights by `seed`: the encoder that has learned nothing.
        seed: of those weights.

    Raises:
        UserError: nothing usable at the path, an unknown padding or precision, two different paddings,
            or a device that is not there.

    Examples:
        >>> encoder = load_encoder("runs/aut_tiny/latest", dtype="bf16")
        >>> encoder.encode(["clip.wav"])[0].dtype  # what comes back is float32 whatever it ran in
        torch.float32
    """
    path, marked = split_padding(str(path_or_hub_id))
    exported = Path(path) / "export" / "encoder"
    path = str(exported) if exported.is_dir() else path
    given = marked if padding is None else _padding(padding)
    if marked and given != marked:
        raise UserError(
            f"{path_or_hub_id} asks for padding {marked}, and padding={padding!r} was given as well. "
            "Leave one of them out."
        )
    place, precision = device_of(device), _dtype(dtype)
    if random_init:
        with seeded(seed):
            whisper = Start(path, revision, random_init=True).encoder
    else:
        whisper = load_whisper_encoder(path, revision)
    padding = given or _padding(getattr(whisper.config, TRAINED_PADDING, RELEASED_PADDING))
    return AudioEncoder(PackedEncoder(whisper, padding).to(device=place, dtype=precision)).to(place)


def split_padding(name: str) -> tuple[str, Padding | None]:
    """Split `NAME@30s` or `NAME@none` into a path or hub id and its padding, None without a mark.

    Raises:
        UserError: something else follows the `@`.

    Examples:
        >>> split_padding("openai/whisper-tiny@30s"), split_padding("runs/aut_tiny/latest")
        (('openai/whisper-tiny', '30s'), ('runs/aut_tiny/latest', None))
    """
    path, at, mark = name.rpartition("@")
    if not at or "/" in mark or Path(name).exists():  # `@` is a letter like any other in a path
        return name, None
    if mark not in PADDINGS:
        raise UserError(
            f"{name}: the padding after @ must be one of {', '.join(PADDINGS)}, not {mark!r}."
            f"{nearest(mark, PADDINGS)}"
        )
    return path, cast(Padding, mark)


def _padding(said: str) -> Padding:
    """Check what a caller or an export's `config.json`, which may be anybody's, says."""
    if said not in PADDINGS:
        raise UserError(f"padding must be one of {', '.join(PADDINGS)}, not {said!r}.")
    return cast(Padding, said)


def device_named(name: str) -> str:
    """Return what PyTorch calls a device: `auto` is a GPU where there is one, else the CPU; `auto` and `cuda` are one GPU a rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def device_of(device: str | torch.device) -> torch.device:
    """Return a device that can be used.

    Raises:
        UserError: it is not there.
    """
    try:
        place = torch.device(device_named(device) if isinstance(device, str) else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built with CUDA
        raise UserError(
            f"Device {str(device)!r} cannot be used: {str(error).splitlines()[0]}"
        ) from None
    return place


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(
            f"dtype must be one of {', '.join(DTYPES)}, or PyTorch's own, not {dtype!r}.{nearest(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


def _listed(audio: Sequence[Audio]) -> Sequence[Audio]:
    if isinstance(audio, (str, os.PathLike)):
        raise UserError(f"Give a list of clips: [{str(audio)!r}] in place of {str(audio)!r}.")
    return audio


def _waveform(clip: Audio, number: int, *, sample_rate_hz: int | None) -> Tensor:
    """One clip as `[S]` at 16 kHz."""
    if isinstance(clip, (str, os.PathLike)):
        try:
            return load_file(Path(clip), LONG_CLIPS)
        except SampleRefused as refused:
            raise UserError(f"{os.fspath(clip)} cannot be used: {refused}.") from None
    if sample_rate_hz is None:
        raise UserError("An array does not know its sampling rate: give sample_rate_hz.")
    samples = clip.detach().cpu().numpy() if isinstance(clip, Tensor) else np.asarray(clip)
    if samples.ndim not in (1, 2) or not len(samples):
        raise ValueError(
            f"clip {number}: expected [S] or [S, channels] with samples, got shape {samples.shape}"
        )
    if samples.dtype.kind in "iu":
        raise ValueError(
            f"clip {number}: samples are {samples.dtype}; give floats between -1 and 1"
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"clip {number}: NaN or infinite samples")
    return to_mono_16k(samples.astype(np.float32, copy=False), sample_rate_hz)
