"""Loading pretrained Whisper checkpoints, and encoding audio with them.

`load_encoder` loads an encoder from a directory or the hub; `AudioEncoder` turns audio files or
arrays of any sampling rate and length into frames or vectors. `PretrainedWhisper` loads the parts
of a checkpoint that training starts from.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from whisper_aut.audio.decode import LONG_CLIPS, SAMPLE_RATE_HZ, load_file, to_mono_16k
from whisper_aut.audio.logmel import WINDOW_SECONDS, LogMel, mel_frames
from whisper_aut.audio.windows import (
    BATCH_SECONDS,
    batches_by_seconds,
    cut_windows,
    join_windows,
    pooling_named,
)
from whisper_aut.errors import SkipSample, UserError, nearest
from whisper_aut.models.encoder import (
    PADDINGS,
    RELEASED_PADDING,
    TRAINED_PADDING,
    PackedEncoder,
    Padding,
)
from whisper_aut.models.seeding import seeded

# Raised by transformers for a directory or download that it cannot load.
UNLOADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
LOADING: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
# Weights that checkpoints may leave out: `proj_out` is tied to the token embedding.
MAY_BE_MISSING = {"proj_out.weight"}
# Vocabulary size of every `whisper-*.en`. Multilingual checkpoints have 51,865 or 51,866 tokens.
ENGLISH_ONLY_TOKENS = 51_864


@dataclass
class PretrainedWhisper:
    """A pretrained Whisper checkpoint. Its parts are loaded when they are first used.

    Args:
        path: hub id or directory.
        revision: branch, tag or commit on the hub. Empty for the default branch.
        random_init: replace the weights with random ones, drawn from PyTorch's global generator.
    """

    path: str
    revision: str = ""
    random_init: bool = False

    @cached_property
    def config(self) -> WhisperConfig:
        """The configuration.

        Raises:
            UserError: there is no Whisper checkpoint, or it is a PEFT adapter, or it uses layer
                dropout.
        """
        if Path(self.path).is_dir():
            refuse_adapter(self.path)
        config = self._load(WhisperConfig.from_pretrained, self.path)
        # Check adapters on the hub only now: the load above has reported an unreachable hub.
        refuse_adapter(self.path, self.revision)
        if config.model_type != "whisper":
            raise UserError(
                f"{self.path} is a {config.model_type!r} model; a Whisper checkpoint is expected."
            )
        if config.encoder_layerdrop or config.decoder_layerdrop:
            raise UserError(
                f"{self.path} sets layer dropout, which packed clips do not support; "
                "set it to 0 in its config.json."
            )
        return config

    @cached_property
    def model(self) -> WhisperForConditionalGeneration:
        """Encoder and decoder, in float32.

        Raises:
            UserError: weights are missing, or the checkpoint is an export without a decoder.
        """
        if self.config.decoder_layers == 0:
            raise UserError(
                f"{self.path} holds an encoder without its decoder, so the whisper decoder cannot "
                "start from it. Start from a full checkpoint, or pick another decoder."
            )
        if self.random_init:
            return WhisperForConditionalGeneration(self.config)
        model, info = self._load(
            WhisperForConditionalGeneration.from_pretrained,
            self.path,
            output_loading_info=True,
            **LOADING,
        )
        refuse_gaps(self.path, info, MAY_BE_MISSING)
        return model

    @cached_property
    def encoder(self) -> WhisperEncoder:
        """The encoder, in float32. Unless `model` was used before, the decoder is not loaded."""
        if "model" in self.__dict__:
            return self.model.model.encoder
        return (
            load_whisper_encoder(self.path, self.revision)
            if not self.random_init
            else WhisperEncoder(self.config)
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load(WhisperTokenizer.from_pretrained, self.path)

    def token_id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]

    @cached_property
    def feature_extractor(self) -> WhisperFeatureExtractor:
        return self._load(WhisperFeatureExtractor.from_pretrained, self.path)

    @property
    def multilingual(self) -> bool:
        """Whether the checkpoint was trained with language and task tokens."""
        return bool(self.generation_config.is_multilingual)  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def generation_config(self) -> GenerationConfig:
        try:
            config = GenerationConfig.from_pretrained(self.path, revision=self.revision or "main")
        except OSError:  # hand-made checkpoints often have none
            config = GenerationConfig.from_model_config(self.config)
        if getattr(config, "is_multilingual", None) is None:
            # Tokenizers of English-only checkpoints contain language tokens too, but untrained.
            english_only = self.config.vocab_size == ENGLISH_ONLY_TOKENS
            set_prompt_tokens(config, self.tokenizer, multilingual=not english_only)
        return config

    def _load(self, loader: Any, path: str, **options: Any) -> Any:
        refuse_no_place(path)
        try:
            with quiet_loading():
                return loader(path, revision=self.revision or "main", **options)
        except UNLOADABLE as error:
            raise UserError(describe_missing(path, error)) from None


def set_prompt_tokens(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, *, multilingual: bool
) -> None:
    """Write Whisper's prompt tokens into a generation config, for `generate` of transformers.

    Args:
        config: the generation config, changed in place.
        tokenizer: the tokenizer of the checkpoint.
        multilingual: whether the checkpoint was trained with language and task tokens.
    """
    ids = tokenizer.get_vocab()
    languages = [f"<|{code}|>" for code in LANGUAGES]
    tokens: dict[str, Any] = {
        "is_multilingual": multilingual and "<|transcribe|>" in ids,
        "no_timestamps_token_id": ids.get("<|notimestamps|>"),
    }
    if tokens["is_multilingual"]:
        tokens["lang_to_id"] = {token: ids[token] for token in languages if token in ids}
        tokens["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    for name, value in tokens.items():
        setattr(config, name, value)


def load_whisper_encoder(path: str, revision: str = "") -> WhisperEncoder:
    """Load only the encoder of a Whisper checkpoint. All its weights must be present.

    Args:
        path: directory or hub id.
        revision: branch, tag or commit on the hub. Empty for the default branch.

    Raises:
        UserError: there is no Whisper checkpoint or no safetensors file, or weights are missing or
            have the wrong shape.
    """
    refuse_no_place(path)
    try:
        with quiet_loading():
            loaded: Any = WhisperEncoder.from_pretrained(
                path,
                revision=revision or "main",
                key_mapping={r"^(model\.)?encoder\.": ""},
                output_loading_info=True,
                **LOADING,
            )
            encoder, info = loaded
    except UNLOADABLE as error:
        raise UserError(describe_missing(path, error)) from None
    refuse_gaps(path, info, set(), only_missing=True)
    return encoder


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' progress bars and load reports. `refuse_gaps` reports what matters."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def refuse_gaps(
    path: str,
    info: dict[str, Any],
    allowed: set[str],
    *,
    only_missing: bool = False,
    kind: str = "Whisper model",
) -> None:
    """Raise `UserError` if weights of a checkpoint are missing, unknown or of the wrong shape.

    Args:
        path: the checkpoint, for the error message.
        info: the loading info that `from_pretrained` returns.
        allowed: weights that may be missing.
        only_missing: accept weights that the model does not have.
        kind: the kind of model, for the error message.
    """
    missing = sorted(set(info["missing_keys"]) - allowed)
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    unexpected = [] if only_missing else sorted(info["unexpected_keys"])
    for what, keys in (
        ("lacks", missing),
        ("has other shapes for", mismatched),
        ("has no place for", unexpected),
    ):
        if keys:
            listed = ", ".join(map(str, keys[:5])) + (" …" if len(keys) > 5 else "")
            raise UserError(
                f"The checkpoint {path} {what} {len(keys)} weights of a {kind}: {listed}."
            )


def refuse_no_place(path: str) -> None:
    """Raise `UserError` if a path is neither a directory nor like a hub id.

    A path in a folder of runs is not taken as a hub id. This avoids slow requests to the hub.
    """
    place = Path(path)
    if place.is_dir():
        return
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(describe_missing(path, OSError()))
    # The parent is a folder of runs, not the owner of a model on the hub.
    if any(place.parent.glob("*/latest")):
        there = sorted(
            entry.name
            for entry in place.parent.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        raise UserError(
            f"There is no {path}.{nearest(place.name, there)} {place.parent} has: "
            f"{', '.join(there) or 'no folder'}."
        )


def refuse_adapter(path: str, revision: str = "") -> None:
    """Raise `UserError` if a directory or hub id contains a PEFT adapter and no model.

    `load_encoder` applies such adapters, but training does not support them.
    """
    try:
        found = find_adapter_config_file(path, revision=revision or "main")
    except OSError:  # there is no such model, or no connection: the load reports it
        return
    if found:
        base = (
            json.loads(Path(found).read_text()).get("base_model_name_or_path") or "its base model"
        )
        raise UserError(
            f"{path} is a PEFT adapter of {base}, not a model. Merge it first: "
            f"peft.PeftModel.from_pretrained(model, {path!r}).merge_and_unload()"
            ".save_pretrained(FOLDER), with the tokenizer's files."
        )


def describe_missing(
    path: str,
    error: Exception,
    *,
    kind: str = "Whisper checkpoint",
    example: str = "openai/whisper-tiny",
) -> str:
    """Return an error message for a checkpoint that cannot be loaded.

    Args:
        path: directory or hub id.
        error: the error that loading raised.
        kind: the kind of checkpoint that was expected.
        example: a valid hub id.
    """
    folder = Path(path)
    if folder.is_dir():
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"{path} is not a usable {kind}: {first}\nIt should hold config.json, "
            "model.safetensors and, for training, "
            f"the tokenizer's files; it holds {there}."
        )
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        return (
            f"There is no model directory {path}. Give a directory in Hugging Face's format or a "
            f"hub id such as {example}."
        )
    return (
        f"{path} is neither a directory here nor a model that could be reached on the hub.\n"
        f"Check the name and the connection, or fetch it first: hf download {path}"
    )


Audio: TypeAlias = np.ndarray | Tensor | str | os.PathLike[str]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECODERS = min(8, os.cpu_count() or 1)
CLIPS_AT_ONCE = 64  # the number of clips, with their frames, that `embed` holds in memory


class AudioEncoder(nn.Module):
    """Encodes audio files and arrays with a packed encoder in eval mode.

    Args:
        encoder: the encoder to run.

    Examples:
        >>> encoder = load_encoder("runs/aut_tiny/latest/export/encoder")
        >>> frames = encoder.encode(["clip.wav"])  # one second, and a frame every 20 ms
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
        """Width D of a frame."""
        return self.encoder.width

    @property
    def padding(self) -> str:
        return self.encoder.padding

    @property
    def layers(self) -> int:
        """Number of layers of the encoder."""
        return len(self.encoder.whisper.layers)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> str:
        """Precision of the weights, a key of `DTYPES`."""
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
        """Encode clips and pool the frames of each clip.

        Args:
            audio, sample_rate_hz, layers, batch_seconds: see `encode`.
            pooling: `mean`, or `mean_std` for mean and standard deviation, which is twice as wide.

        Returns:
            One vector per clip, `[B, D']`, or `[B, layers, D']` if `layers` is given.

        Raises:
            UserError, ValueError: see `encode`.

        Examples:
            >>> encoder = load_encoder("runs/aut_tiny/latest/export/encoder")
            >>> vectors = encoder.embed(["clip.wav", "clip.wav"], pooling="mean_std")
            >>> vectors.shape == (2, 2 * encoder.width)
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
        """Encode waveforms `[S]` of at most 30 s each, as one batch."""
        mel = torch.cat([self.logmel(waveform.to(self.device)) for waveform in waveforms])
        lengths = [mel_frames(len(waveform)) for waveform in waveforms]
        if not layers:
            frames = self.encoder(mel, lengths)
            # Copy to the CPU once for all clips.
            return replace(frames, values=frames.values.float().cpu()).valid()
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
                f"The encoder has layers 0 (what enters the first) to {self.layers}; "
                f"asked for: {asked}."
            )

    def fingerprint(self) -> str:
        """Return a hash of all that determines the frames: weights, padding and precision."""
        digest = hashlib.sha256(f"{self.padding}{self.dtype}".encode())
        for name, weight in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@contextmanager
def hidden_states(encoder: PackedEncoder) -> Iterator[list[Tensor]]:
    """Collect the packed input `[ΣT, D]` of each layer while the encoder runs.

    It is read from the input of the layer's first norm.
    """
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
    path, marked = split_padding(str(path_or_hub_id))
    exported = Path(path) / "export" / "encoder"
    path = str(exported) if exported.is_dir() else path
    given = marked if padding is None else _padding(padding)
    if marked and given != marked:
        raise UserError(
            f"{path_or_hub_id} asks for padding {marked}, "
            f"and padding={padding!r} was given as well. "
            "Leave one of them out."
        )
    place, precision = device_of(device), _dtype(dtype)
    if random_init:
        with seeded(seed):
            whisper = PretrainedWhisper(path, revision, random_init=True).encoder
    else:
        whisper = load_whisper_encoder(path, revision)
    padding = given or _padding(getattr(whisper.config, TRAINED_PADDING, RELEASED_PADDING))
    return AudioEncoder(PackedEncoder(whisper, padding).to(device=place, dtype=precision)).to(place)


def split_padding(name: str) -> tuple[str, Padding | None]:
    """Split `NAME@30s` or `NAME@none` into a path or hub id and a padding mode.

    Returns:
        The path or hub id, and the padding mode, or None if the name has no `@` suffix.

    Raises:
        UserError: the suffix is not a padding mode.

    Examples:
        >>> split_padding("openai/whisper-tiny@30s"), split_padding("runs/aut_tiny/latest")
        (('openai/whisper-tiny', '30s'), ('runs/aut_tiny/latest', None))
    """
    path, at, mark = name.rpartition("@")
    if not at or "/" in mark or Path(name).exists():  # paths may contain `@` too
        return name, None
    if mark not in PADDINGS:
        raise UserError(
            f"{name}: the padding after @ must be one of {', '.join(PADDINGS)}, not {mark!r}."
            f"{nearest(mark, PADDINGS)}"
        )
    return path, cast(Padding, mark)


def _padding(said: str) -> Padding:
    """Validate a padding mode from a caller or from the `config.json` of a checkpoint."""
    if said not in PADDINGS:
        raise UserError(f"padding must be one of {', '.join(PADDINGS)}, not {said!r}.")
    return cast(Padding, said)


def device_named(name: str) -> str:
    """Return PyTorch's name of a device.

    `auto` is a GPU if there is one, otherwise the CPU. `cuda`, also if it comes from `auto`, is the
    GPU of this rank (`LOCAL_RANK`).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def device_of(device: str | torch.device) -> torch.device:
    """Return a device after checking that it is available.

    Raises:
        UserError: the device is not available.
    """
    try:
        place = torch.device(device_named(device) if isinstance(device, str) else device)
        torch.empty(0, device=place)
    # PyTorch raises AssertionError if it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"Device {str(device)!r} cannot be used: {str(error).splitlines()[0]}"
        ) from None
    return place


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(
            f"dtype must be one of {', '.join(DTYPES)}, or PyTorch's own, not {dtype!r}."
            f"{nearest(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


def _listed(audio: Sequence[Audio]) -> Sequence[Audio]:
    if isinstance(audio, (str, os.PathLike)):
        raise UserError(f"Give a list of clips: [{str(audio)!r}] in place of {str(audio)!r}.")
    return audio


def _waveform(clip: Audio, number: int, *, sample_rate_hz: int | None) -> Tensor:
    """Return a clip as mono waveform `[S]` at 16 kHz."""
    if isinstance(clip, (str, os.PathLike)):
        try:
            return load_file(Path(clip), LONG_CLIPS)
        except SkipSample as refused:
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
