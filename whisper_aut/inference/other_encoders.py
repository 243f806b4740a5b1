"""Encoders other than Whisper, for probes: models of transformers, and classes in X-ARES's form.

Clips are never padded to a batch: some models normalise over a whole clip (group norm in wav2vec
2.0), others have no attention mask for audio. So each clip gives the same frames as alone.
"""

import hashlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

import soxr
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from whisper_aut.audio.decode import SAMPLE_RATE_HZ, to_mono_16k
from whisper_aut.audio.windows import BATCH_SECONDS
from whisper_aut.errors import UserError
from whisper_aut.inference.encoder import DTYPES, encode_in_batches, resolve_device
from whisper_aut.models.pretrained import (
    CONFIG,
    check_loaded_weights,
    check_model_path,
    find_cached,
    load_pretrained,
    quiet_loading,
    seeded,
)

FBANK_HOP, FBANK_WINDOW = 160, 400  # samples of Kaldi's filter banks at 16 kHz


class OtherEncoder(nn.Module, ABC):
    """Base of encoders that turn each window of a clip into frames.

    Args:
        model: runs in eval mode.
        sample_rate_hz: what the model expects. Clips arrive at 16 kHz and are resampled, so a model
            for 48 kHz gets nothing above 8 kHz.
        settings: what the frames depend on besides the weights.
    """

    def __init__(self, model: nn.Module, sample_rate_hz: int, settings: str):
        super().__init__()
        self.model: Any = model
        self.sample_rate_hz = sample_rate_hz
        self.settings = settings
        self.eval()

    @torch.inference_mode()
    def encode(
        self,
        waveforms: Sequence[Tensor],
        sample_rate_hz: int,
        layers: Sequence[int] = (),
        *,
        batch_seconds: float = BATCH_SECONDS,
    ) -> list[Tensor]:
        """Encode clips `[S]`, as `AudioEncoder.encode` does. Windows overlap by 2 s after 30 s.

        Returns:
            `[T, D]` of each clip, or `[layers, T, D]` if `layers` is given, in float32 on the CPU.
        """
        clips = [to_mono_16k(clip.numpy(), sample_rate_hz) for clip in waveforms]
        return encode_in_batches(
            lambda windows: self._encode_batch(windows, layers), clips, batch_seconds=batch_seconds
        )

    def fingerprint(self) -> str:
        """Return a hash of all that determines the frames: weights, precision and settings."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.settings}".encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(f"{name} {weight.dtype}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _encode_batch(self, windows: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
        """Encode windows `[S]` at 16 kHz, sorted by length; those of equal length together."""
        frames = []
        for _, group in groupby(windows, key=len):
            batch = torch.stack(list(group)).numpy()
            if self.sample_rate_hz != SAMPLE_RATE_HZ:
                batch = soxr.resample(batch.T, SAMPLE_RATE_HZ, self.sample_rate_hz).T
            frames += [clip.float().cpu() for clip in self._frames(torch.tensor(batch), layers)]
        return frames

    @abstractmethod
    def _frames(self, clips: Tensor, layers: Sequence[int]) -> Tensor:
        """Return the frames `[B, T, D]` of clips `[B, S]`, or `[B, layers, T, D]`."""


class TransformersEncoder(OtherEncoder):
    """Base of the models of transformers, each with its feature extractor."""

    def __init__(self, model: Any, extractor: Any):
        super().__init__(model, extractor.sampling_rate, extractor.to_json_string())
        self.extractor = extractor

    def _extract(self, clips: Tensor) -> Tensor:
        """Return the model's input for clips `[B, S]`, on its device."""
        found = self.extractor(
            list(clips.numpy()), sampling_rate=self.sample_rate_hz, return_tensors="pt"
        )
        weight = next(self.model.parameters())
        values = found[self.extractor.model_input_names[0]]
        return values.to(device=weight.device, dtype=weight.dtype)

    def _hidden(self, values: Tensor, layers: Sequence[int]) -> Tensor:
        """Return the output of the model `[B, T, D]`, or hidden states `[B, layers, T, D]`."""
        output = self.model(values, output_hidden_states=bool(layers))
        if not layers:
            return output.last_hidden_state
        states = [*output.hidden_states[:-1], output.last_hidden_state]
        return torch.stack([states[layer] for layer in layers], dim=1)


class WaveformEncoder(TransformersEncoder):
    """wav2vec 2.0, HuBERT, WavLM and data2vec: convolutions on samples, a frame every 20 ms."""

    def __init__(self, model: Any, extractor: Any):
        super().__init__(model, extractor)
        self.layers = model.config.num_hidden_layers
        self.min_samples = 1  # the receptive field of one frame
        shapes = zip(model.config.conv_kernel, model.config.conv_stride, strict=True)
        for kernel, stride in reversed(list(shapes)):
            self.min_samples = (self.min_samples - 1) * stride + kernel

    def _frames(self, clips: Tensor, layers: Sequence[int]) -> Tensor:
        values = self._extract(clips)
        values = nn.functional.pad(values, (0, max(0, self.min_samples - values.shape[1])))
        return self._hidden(values, layers)


class PatchEncoder(TransformersEncoder):
    """The Audio Spectrogram Transformer: patches of a spectrogram of fixed length.

    A frame is the mean of the patches at one time, over frequency. Clips are cut into pieces of the
    model's length (10.24 s), and patches after the end of a clip are left out.
    """

    def __init__(self, model: Any, extractor: Any):
        super().__init__(model, extractor)
        self.layers = model.config.num_hidden_layers

    def _frames(self, clips: Tensor, layers: Sequence[int]) -> Tensor:
        config, parts = self.model.config, []
        for piece in _pieces(clips, (config.max_length - 1) * FBANK_HOP + FBANK_WINDOW):
            missing = max(0, FBANK_WINDOW - piece.shape[1])
            hidden = self._hidden(self._extract(nn.functional.pad(piece, (0, missing))), layers)
            _, columns = self.model.embeddings.get_shape(config)
            spectra = 1 + (piece.shape[1] + missing - FBANK_WINDOW) // FBANK_HOP
            valid = max(1, (spectra - config.patch_size) // config.time_stride + 1)
            patches = hidden[..., 2:, :].unflatten(-2, (-1, columns))  # after two class tokens
            parts.append(patches.mean(-3)[..., :valid, :])
        return torch.cat(parts, dim=-2)


class ClapEncoder(TransformersEncoder):
    """The audio tower of CLAP, before its projection: 32 frames for a window of 10 s.

    Shorter clips are repeated up to 10 s, as in training, and longer ones are cut into windows.
    Only frames of the first repetition are returned. There are no single layers.
    """

    def __init__(self, model: Any, extractor: Any):
        super().__init__(model.audio_model, extractor)

    def _frames(self, clips: Tensor, layers: Sequence[int]) -> Tensor:
        window, parts = self.extractor.nb_max_samples, []
        for piece in _pieces(clips, window):
            features = self._extract(piece)
            longer = torch.zeros(len(piece), 1, dtype=torch.bool, device=features.device)
            output = self.model(input_features=features, is_longer=longer)
            frames = output.last_hidden_state.mean(2).transpose(1, 2)  # over frequency
            parts.append(frames[:, : ceil(frames.shape[1] * piece.shape[1] / window)])
        return torch.cat(parts, dim=1)


def _pieces(clips: Tensor, samples: int) -> Iterator[Tensor]:
    """Cut clips `[B, S]`. What is left at the end counts from a hundredth of a piece on."""
    least = samples // 100
    for start in range(0, clips.shape[1], samples):
        if not start or clips.shape[1] - start >= least:
            yield clips[:, start : start + samples]


class CustomEncoder(OtherEncoder):
    """A class of the user in the form that X-ARES takes.

    The model has `sampling_rate` and `forward`: audio `[B, S]` → frames `[B, T, D]`.
    """

    def _frames(self, clips: Tensor, layers: Sequence[int]) -> Tensor:
        weight = next(self.model.parameters(), clips)
        frames = self.model(clips.to(device=weight.device, dtype=weight.dtype))
        if frames.ndim != 3 or len(frames) != len(clips):
            raise UserError(
                f"{type(self.model).__name__}.forward returned {list(frames.shape)} for audio "
                f"{list(clips.shape)}; expected frames [{len(clips)}, T, D]."
            )
        return frames


MODEL_TYPES: dict[str, type[TransformersEncoder]] = {
    "wav2vec2": WaveformEncoder,
    "hubert": WaveformEncoder,
    "wavlm": WaveformEncoder,
    "data2vec-audio": WaveformEncoder,
    "audio-spectrogram-transformer": PatchEncoder,
    "clap": ClapEncoder,
}


def model_type(path: str) -> str:
    """Return the `model_type` of a directory or hub model; empty for a directory without one.

    Raises:
        UserError: there is no such directory or model.
    """
    check_model_path(path)
    source = find_cached(path, "", CONFIG)
    if Path(source).is_dir() and not (Path(source) / CONFIG).is_file():
        return ""
    return _load(AutoConfig, path).model_type


def _load(kind: Any, path: str, **options: Any) -> Any:
    return load_pretrained(kind, path, "", CONFIG, what="encoder", **options)


def load_other_encoder(
    path: str, *, device: str = "cpu", dtype: str = "fp32", random_init: bool = False, seed: int = 0
) -> OtherEncoder:
    """Load a model of transformers whose `model_type` is in `MODEL_TYPES`, see `load_encoder`.

    Raises:
        UserError: the model cannot be loaded, or some of its weights are missing.
    """
    kind = MODEL_TYPES[model_type(path)]
    extractor = _load(AutoFeatureExtractor, path)
    if random_init:
        with seeded(seed), quiet_loading():
            model = AutoModel.from_config(_load(AutoConfig, path))
    else:
        # Files other than safetensors are read with `weights_only=True`.
        model, info = _load(AutoModel, path, dtype=torch.float32, output_loading_info=True)
        # Heads are unexpected; masks for pretraining may be missing.
        info["unexpected_keys"] = ()
        check_loaded_weights(path, info, {"masked_spec_embed"}, kind="model of this type")
    return kind(model, extractor).to(device=resolve_device(device), dtype=DTYPES[dtype])


def load_custom_encoder(name: str, *, device: str = "cpu", dtype: str = "fp32") -> OtherEncoder:
    """Load `FILE.py:CLASS`, a class that takes no arguments. The file is executed.

    Raises:
        UserError: there is no such file or class, or the class lacks what X-ARES needs.
    """
    file, _, class_name = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{name}: there is no file {path}.")
    spec: Any = importlib.util.spec_from_file_location(f"custom_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        raise UserError(f"{name}: {path} has no class {class_name}.")
    model: Any = getattr(module, class_name)()
    if not isinstance(model, nn.Module) or not hasattr(model, "sampling_rate"):
        raise UserError(
            f"{name}: {class_name} must be a torch.nn.Module with `sampling_rate` and `forward`: "
            "audio [B, S] → frames [B, T, D]."
        )
    source = hashlib.sha256(path.read_bytes()).hexdigest()
    encoder = CustomEncoder(model, int(model.sampling_rate), source)  # pyright: ignore
    return encoder.to(device=resolve_device(device), dtype=DTYPES[dtype])
