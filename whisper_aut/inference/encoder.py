"""Encode audio with a pretrained or trained encoder.

`load_encoder` loads an encoder from a directory or the hub. `AudioEncoder` turns files or arrays
into frames or vectors.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from whisper_aut.audio.decode import LONG_CLIPS, SAMPLE_RATE_HZ, load_file, to_mono_16k
from whisper_aut.audio.logmel import WINDOW_SECONDS, LogMel, mel_frames
from whisper_aut.audio.windows import (
    BATCH_SECONDS,
    batches_by_seconds,
    cut_windows,
    get_pooling,
    join_windows,
)
from whisper_aut.errors import SkipSample, UserError, nearest
from whisper_aut.models.encoder import (
    PADDINGS,
    RELEASED_PADDING,
    TRAINED_PAD_TO_30S,
    TRAINED_PADDING,
    PackedEncoder,
    Padding,
)
from whisper_aut.models.pretrained import PretrainedWhisper, seeded
from whisper_aut.onednn import use_onednn

Audio: TypeAlias = np.ndarray | Tensor | str | os.PathLike[str]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECODE_THREADS = min(8, os.cpu_count() or 1)
CLIPS_AT_ONCE = 64  # the number of clips, with their frames, that `embed` holds in memory


class AudioEncoder(nn.Module):
    """Encodes audio files and arrays with a packed encoder in eval mode.

    Args:
        encoder: the encoder.
        trained_padding: the padding that it was trained with, in words. Empty if unknown.

    Examples:
        >>> encoder = load_encoder("runs/aut_tiny/latest/export/encoder")
        >>> frames = encoder.encode(["clip.wav"])  # one second, and a frame every 20 ms
        >>> [tuple(clip.shape) for clip in frames] == [(50, encoder.width)]
        True
    """

    def __init__(self, encoder: PackedEncoder, trained_padding: str = ""):
        super().__init__()
        self.encoder, self.trained_padding = encoder, trained_padding
        self.logmel = LogMel(encoder.num_mel_bins)
        self.eval()

    @property
    def width(self) -> int:
        return self.encoder.width

    @property
    def padding(self) -> str:
        return self.encoder.padding

    @property
    def layers(self) -> int:
        return len(self.encoder.whisper.layers)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> str:
        """Precision of the weights, a key of `DTYPES` or the name of another dtype."""
        found = next(self.parameters()).dtype
        return next((name for name, dtype in DTYPES.items() if dtype == found), str(found))

    @torch.inference_mode()
    def encode(
        self,
        audio: Sequence[Audio],
        sample_rate_hz: int | None = None,
        layers: Sequence[int] = (),
        *,
        batch_seconds: float = BATCH_SECONDS,
    ) -> list[Tensor]:
        """Encode clips of any length. Clips over 30 s are encoded in windows that overlap by 2 s.

        Args:
            audio: paths of audio files, or arrays `[S]` or `[S, channels]` with the same sampling
                rate.
            sample_rate_hz: sampling rate of the arrays.
            layers: return these hidden states instead of the output. They are numbered as in
                Hugging Face: 0 is the input of the first layer, and the last one is the output.
            batch_seconds: seconds of audio per batch. Memory use grows with it.

        Returns:
            The valid frames of each clip (20 ms each), `[T, D]`, or `[layers, T, D]` if `layers` is
            given. They are float32 and on the CPU.

        Raises:
            UserError: a file cannot be used, arrays come without a sampling rate, or the encoder
                does not have one of the layers.
            ValueError: an array is empty, has the wrong shape, holds integers, or is not finite.

        Examples:
            >>> chirp = np.sin(np.linspace(0, 3000, 8000, dtype=np.float32) ** 1.2)
            >>> encoder = load_encoder("runs/aut_tiny/latest/export/encoder")
            >>> clips = encoder.encode([chirp], sample_rate_hz=8_000, layers=[0, 1])
            >>> clips[0].shape[:2]  # layers, frames
            torch.Size([2, 50])
        """
        _check_list(audio)
        if any(not 0 <= layer <= self.layers for layer in layers):
            raise UserError(
                f"The encoder has layers 0 (the input of the first layer) to {self.layers}, "
                f"not {', '.join(map(str, layers))}."
            )
        load = partial(_waveform, sample_rate_hz=sample_rate_hz)
        with ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode") as pool:
            waveforms = list(pool.map(load, audio, range(len(audio))))
        encode_batch = partial(self._encode_batch, layers=layers)
        return encode_in_batches(
            encode_batch, waveforms, batch_seconds=batch_seconds, padding=self.padding
        )

    def embed(
        self,
        audio: Sequence[Audio],
        sample_rate_hz: int | None = None,
        *,
        pooling: str = "mean",
        layers: Sequence[int] = (),
        batch_seconds: float = BATCH_SECONDS,
    ) -> Tensor:
        """Encode clips, see `encode`, and pool the frames of each clip.

        Args:
            pooling: `mean`, or `mean_std` for mean and standard deviation, which is twice as wide.

        Returns:
            One vector per clip, `[B, D']`, or `[B, layers, D']` if `layers` is given.

        Examples:
            >>> encoder = load_encoder("runs/aut_tiny/latest/export/encoder")
            >>> vectors = encoder.embed(["clip.wav", "clip.wav"], pooling="mean_std")
            >>> vectors.shape == (2, 2 * encoder.width)
            True
        """
        _check_list(audio)
        pool, rows = get_pooling(pooling), []
        for start in range(0, len(audio), CLIPS_AT_ONCE):
            group = audio[start : start + CLIPS_AT_ONCE]
            clips = self.encode(group, sample_rate_hz, layers, batch_seconds=batch_seconds)
            rows += [pool(frames) for frames in clips]
        shape = (1, len(layers), 1, self.width) if layers else (1, 1, self.width)
        return torch.stack(rows) if rows else pool(torch.zeros(shape))[:0]

    def fingerprint(self) -> str:
        """Return a hash of all that determines the frames: weights, size of the attention heads,
        activation, padding and precision.
        """
        digest = hashlib.sha256(f"{self.padding}{self.dtype}".encode())
        config = self.encoder.whisper.config
        own = config.d_model // config.encoder_attention_heads, config.activation_function
        if own != (64, "gelu"):  # which all released Whispers have, whose hashes stay as they were
            digest.update(str(own).encode())
        for name, weight in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _encode_batch(self, waveforms: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
        mel = torch.cat([self.logmel(waveform.to(self.device)) for waveform in waveforms])
        lengths = [mel_frames(len(waveform)) for waveform in waveforms]
        frames = self.encoder(mel, lengths, keep_states=bool(layers))
        # Copy to the CPU once for all clips.
        chosen = [frames.states[layer] for layer in layers] or [frames.values]
        on_cpu = (replace(frames, values=values.float().cpu()) for values in chosen)
        clips = zip(*(layer.valid() for layer in on_cpu), strict=True)
        return [torch.stack(clip) if layers else clip[0] for clip in clips]


def encode_in_batches(
    encode_batch: Callable[[list[Tensor]], Sequence[Tensor]],
    waveforms: Sequence[Tensor],
    *,
    batch_seconds: float = BATCH_SECONDS,
    padding: str = "none",
) -> list[Tensor]:
    """Encode clips of any length with a function that takes a batch of clips of up to 30 s.

    Long clips are cut into windows. Windows are sorted by length and batched by seconds.

    Args:
        encode_batch: waveforms `[S]` at 16 kHz → the frames `[…, T, D]` of each.
        waveforms: the clips, `[S]` at 16 kHz.
        batch_seconds: seconds of audio per batch. With padding `30s`, every window counts as 30 s.

    Returns:
        The frames of each clip, `[…, T, D]`.
    """
    clips = [cut_windows(waveform) for waveform in waveforms]
    windows = [window for clip in clips for window in clip]
    order = sorted(range(len(windows)), key=lambda index: len(windows[index]))
    seconds = [
        WINDOW_SECONDS if padding == "30s" else len(windows[index]) / SAMPLE_RATE_HZ
        for index in order
    ]
    frames: dict[int, Tensor] = {}
    for batch in batches_by_seconds(seconds, batch_seconds):
        indices = [order[position] for position in batch]
        encoded = encode_batch([windows[index] for index in indices])
        frames.update(zip(indices, encoded, strict=True))
    in_order = (frames[index] for index in range(len(windows)))
    return [join_windows([next(in_order) for _ in clip]) for clip in clips]


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
    """Load the encoder of a Whisper checkpoint, either exported from a run or from the hub.

    Args:
        path_or_hub_id: a directory in Hugging Face's format, the directory of a training run (its
            exported encoder is loaded), or a hub id such as `openai/whisper-tiny`. The padding mode
            can be appended, as in `openai/whisper-tiny@none`.
        padding: `none` runs clips at their own length, `30s` pads them and gives the same results
            as Hugging Face. By default, the mode that the encoder was trained with: exports store
            it in `config.json`; all other checkpoints use `30s`.
        device: the device to run on. `auto` selects a GPU if there is one.
        dtype: the precision to run in: a PyTorch dtype, or `fp32`, `bf16` or `fp16`.
        revision: branch, tag or commit on the hub. Empty for the default branch.
        random_init: replace the weights with random ones, as an untrained baseline.
        seed: seed of the random weights.

    Raises:
        UserError: the checkpoint is not usable, padding or precision are unknown, two different
            padding modes are given, or the device is not available.

    Examples:
        >>> encoder = load_encoder("runs/aut_tiny/latest", dtype="bf16")
        >>> encoder.encode(["clip.wav"])[0].dtype  # float32, whatever the encoder runs in
        torch.float32
    """
    path, suffix = split_padding(str(path_or_hub_id))
    if padding is not None and suffix and _check_padding(padding) != suffix:
        raise UserError(
            f"{path_or_hub_id} names padding {suffix}, but padding={padding!r} was given as well. "
            "Leave one of them out."
        )
    padding = suffix if padding is None else _check_padding(padding)
    exported = Path(path) / "export" / "encoder"
    source = str(exported) if exported.is_dir() else path
    pretrained = PretrainedWhisper(source, revision, random_init)
    device = resolve_device(device)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(
            f"dtype must be a PyTorch dtype or one of {', '.join(DTYPES)}, not {dtype!r}."
            f"{nearest(dtype, DTYPES)}"
        )
    with seeded(seed):
        whisper = pretrained.encoder
    if padding is None:
        padding = trained_padding(whisper.config)
    encoder = PackedEncoder(whisper, padding)
    use_onednn(encoder)
    precision = DTYPES[dtype] if isinstance(dtype, str) else dtype
    trained = "" if random_init else trained_padding(whisper.config)
    if trained and (mixed := getattr(whisper.config, TRAINED_PAD_TO_30S, 0)):
        trained += f", 30s for {mixed} of the clips"
    return AudioEncoder(encoder.to(device=device, dtype=precision), trained).to(device)


def split_padding(name: str) -> tuple[str, Padding | None]:
    """Split `NAME@30s` or `NAME@none` into a path or hub id and a padding mode.

    Raises:
        UserError: the suffix is not a padding mode.

    Examples:
        >>> split_padding("openai/whisper-tiny@30s"), split_padding("runs/aut_tiny/latest")
        (('openai/whisper-tiny', '30s'), ('runs/aut_tiny/latest', None))
    """
    path, at, suffix = name.rpartition("@")
    if not at or "/" in suffix or Path(name).exists():  # paths may contain `@` too
        return name, None
    if suffix not in PADDINGS:
        raise UserError(
            f"{name}: the padding after @ must be one of {', '.join(PADDINGS)}, not {suffix!r}."
            f"{nearest(suffix, PADDINGS)}"
        )
    return path, cast(Padding, suffix)


def trained_padding(config: PretrainedConfig) -> Padding:
    """Return the padding mode that a checkpoint was trained with: `30s` for a released Whisper."""
    return _check_padding(getattr(config, TRAINED_PADDING, RELEASED_PADDING))


def _check_padding(padding: str) -> Padding:
    if padding not in PADDINGS:
        raise UserError(f"padding must be one of {', '.join(PADDINGS)}, not {padding!r}.")
    return cast(Padding, padding)


def device_name(name: str) -> str:
    """Return PyTorch's name of a device.

    `auto` is a GPU if there is one, otherwise the CPU. `cuda`, also if it comes from `auto`, is the
    GPU of this rank (`LOCAL_RANK`).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def resolve_device(device: str | torch.device) -> torch.device:
    """Return a device, by its `device_name`, after checking that it is available.

    Raises:
        UserError: the device is not available.
    """
    try:
        resolved = torch.device(device_name(device) if isinstance(device, str) else device)
        torch.empty(0, device=resolved)
    # PyTorch raises AssertionError if it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Device {str(device)!r} cannot be used: {reason}") from None
    return resolved


def _check_list(audio: Sequence[Audio]) -> None:
    if isinstance(audio, (str, os.PathLike)):
        raise UserError(f"Give a list of clips: [{str(audio)!r}] instead of {str(audio)!r}.")


def _waveform(clip: Audio, position: int, *, sample_rate_hz: int | None) -> Tensor:
    if isinstance(clip, (str, os.PathLike)):
        try:
            return load_file(Path(clip), LONG_CLIPS)
        except SkipSample as skip:
            raise UserError(f"{os.fspath(clip)} cannot be used: {skip}.") from None
    if sample_rate_hz is None:
        raise UserError("Arrays need their sampling rate: pass sample_rate_hz.")
    if isinstance(clip, Tensor):
        clip = clip.detach().to("cpu", torch.float32 if clip.is_floating_point() else clip.dtype)
    samples = np.asarray(clip)
    problem = ""
    if samples.ndim not in (1, 2) or not samples.size:
        problem = f"expected [S] or [S, channels] with samples, got shape {samples.shape}"
    elif samples.ndim == 2 and samples.shape[1] > len(samples):
        problem = f"channels come last, [S, channels], but the shape is {samples.shape}"
    elif samples.dtype.kind in "iu":
        problem = f"samples are {samples.dtype}; give floats between -1 and 1"
    elif not np.isfinite(samples).all():
        problem = "samples are NaN or infinite"
    if problem:
        raise ValueError(f"clip {position}: {problem}")
    return to_mono_16k(samples.astype(np.float32, copy=False), sample_rate_hz)
