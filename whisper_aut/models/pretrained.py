"""A trained encoder for its users: audio in, frames or vectors out.

In: a hub id or directory in Hugging Face's Whisper format, and audio files or arrays of any rate and length. Out: one `[T, D]` tensor a
clip, its valid frames only, or one vector a clip. Next: probes, an index to search in, a language model. `whisper_aut.load_encoder` is this
module's function.
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
from whisper_aut.errors import SampleRefused, UserError, nearest
from whisper_aut.models.encoder import (
    PADDINGS,
    RELEASED_PADDING,
    TRAINED_PADDING,
    PackedEncoder,
    Padding,
)
from whisper_aut.models.seeding import seeded

# What transformers raises on a directory or a download that it cannot load.
UNLOADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
LOADING: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
# Frozen tables that checkpoints may leave out: Hugging Face rebuilds the first from the second or by formula.
MAY_BE_MISSING = {"proj_out.weight"}
ENGLISH_ONLY_TOKENS = 51_864  # of every `whisper-*.en`; the multilingual ones have 51,865 or 51,866


@dataclass
class Start:
    """A checkpoint to start from.

    Args:
        path: hub id or directory.
        revision: branch, tag or commit on the hub; empty for the default.
        random_init: build the architecture with new weights, seeded by PyTorch's global generator.
    """

    path: str
    revision: str = ""
    random_init: bool = False

    @cached_property
    def config(self) -> WhisperConfig:
        if Path(self.path).is_dir():
            refuse_adapter(self.path)
        config = self._load(WhisperConfig.from_pretrained, self.path)
        refuse_adapter(self.path, self.revision)  # of the hub, which has been reached by now
        if config.model_type != "whisper":
            raise UserError(
                f"{self.path} is a {config.model_type!r} model; a Whisper checkpoint is expected."
            )
        if config.encoder_layerdrop or config.decoder_layerdrop:
            raise UserError(
                f"{self.path} sets layer dropout, which packed clips do not support; set it to 0 in its config.json."
            )
        return config

    @cached_property
    def model(self) -> WhisperForConditionalGeneration:
        """Encoder and decoder together, float32.

        Raises:
            UserError: weights missing, or an export without a decoder.
        """
        if self.config.decoder_layers == 0:
            raise UserError(
                f"{self.path} holds an encoder without its decoder, so the whisper decoder cannot start from it. "
                "Start from a full checkpoint, or pick another decoder."
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
        """The encoder alone, float32; the decoder's weights are not read into memory where it was not loaded already."""
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
        except OSError:  # checkpoints made by hand often have none
            config = GenerationConfig.from_model_config(self.config)
        if getattr(config, "is_multilingual", None) is None:
            # The tokenizers of English-only checkpoints hold language tokens too, never trained.
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
    """Write into a generation config which prompt tokens a Whisper has, as `generate` of transformers reads them."""
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
    """Load only the encoder of any Whisper directory or hub id, strictly: every encoder weight must be there.

    Raises:
        UserError: nothing there, not a Whisper checkpoint, no safetensors, or weights missing or of another shape.
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
    """Silence transformers' bars and reports of a load: `refuse_gaps` says what matters of them."""
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
    """Raise where loading left weights at their random start, or read weights that the model has no place for."""
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
    """Raise where a path is neither a directory nor like a hub id, before a minute is spent asking the hub for it."""
    place = Path(path)
    if place.is_dir():
        return
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(describe_missing(path, OSError()))
    if any(place.parent.glob("*/latest")):  # a folder of runs, not an owner of models on the hub
        there = sorted(
            entry.name
            for entry in place.parent.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        raise UserError(
            f"There is no {path}.{nearest(place.name, there)} {place.parent} has: {', '.join(there) or 'no folder'}."
        )


def refuse_adapter(path: str, revision: str = "") -> None:
    """Raise where a directory or hub id holds low-rank updates and no model; `load_encoder` applies them, training does not."""
    try:
        found = find_adapter_config_file(path, revision=revision or "main")
    except OSError:  # no such model, or no hub: loading says so
        return
    if found:
        base = (
            json.loads(Path(found).read_text()).get("base_model_name_or_path") or "its base model"
        )
        raise UserError(
            f"{path} is a PEFT adapter of {base}, not a model. Merge it first: "
            f"peft.PeftModel.from_pretrained(model, {path!r}).merge_and_unload().save_pretrained(FOLDER), with the tokenizer's files."
        )


def describe_missing(
    path: str,
    error: Exception,
    *,
    kind: str = "Whisper checkpoint",
    example: str = "openai/whisper-tiny",
) -> str:
    """Say what a checkpoint directory lacks, what is in it, and what to do."""
    folder = Path(path)
    if folder.is_dir():
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"{path} is not a usable {kind}: {first}\nIt should hold config.json, model.safetensors and, for training, "
            f"the tokenizer's files; it holds {there}."
        )
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        return f"There is no model directory {path}. Give a directory in Hugging Face's format or a hub id such as {example}."
    return (
        f"{path} is neither a directory here nor a model that could be reached on the hub.\n"
        f"Check the name and the connection, or fetch it first: hf download {path}"
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
