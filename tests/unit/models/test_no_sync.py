"""The host never waits for a GPU in a training step.

PyTorch's fake tensors have a device, but no values: on fake CUDA tensors `.item()`, masks and mixed
devices raise. Backward and autocast need a driver, so the models are bfloat16 and only run forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperDecoder as HFWhisperDecoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.support.decoders import tiny_configs
from tests.support.training import QUIET, add_callbacks, settings_for
from whisper_aut.audio import augment
from whisper_aut.audio.augment import Augment, AugmentSettings
from whisper_aut.audio.logmel import LogMel
from whisper_aut.data.batch import Waveforms, collate
from whisper_aut.data.datamodule import DeviceFeatures
from whisper_aut.models import attention
from whisper_aut.models.adapters import AdapterOptions, build_adapter
from whisper_aut.models.decoders.causal_lm import CausalLMDecoder
from whisper_aut.models.decoders.whisper import WhisperDecoder
from whisper_aut.models.distillation import Distillation
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.models.language_model import SequenceLayout
from whisper_aut.models.module import MicroBatchResult
from whisper_aut.training.plan import placeholder_targets
from whisper_aut.training.train import train

CUDA = torch.device("cuda", 0)
SAMPLES, TEXTS = (8_000, 24_000, 24_000), (5, 9, 7)
CONFIG, LANGUAGE = tiny_configs(layers=2)


class NoWaiting(TorchDispatchMode):
    """Rejects copies for which the host waits: from the device, or to it and blocking."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        wrote = {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)}
        assert not ("cuda" in read and "cpu" in wrote), f"{func} copies to the host"
        if "cpu" in read and wrote == {"cuda"} and func is torch.ops.aten._to_copy.default:
            assert (kwargs or {}).get("non_blocking"), f"{func} waits for a copy to the device"
        return out


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention._has_flash.cache_clear()
    # Masks are drawn on the host, from a generator that has values.
    monkeypatch.setattr(augment, "_draw_mask", lambda random, size, width: slice(1, 3))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        attention._has_flash.cache_clear()


def whisper_decoder() -> nn.Module:
    return WhisperDecoder(HFWhisperDecoder(CONFIG), 0)


def language_decoder(packed: bool) -> nn.Module:
    model = AutoModelForCausalLM.from_config(LANGUAGE)
    adapter = build_adapter(AdapterOptions(), CONFIG.d_model, LANGUAGE.hidden_size, 1.0)
    return CausalLMDecoder(model, adapter, 3, 0, {}, SequenceLayout(packed=packed))


@pytest.mark.parametrize("padding", ["none", "30s"])
@pytest.mark.parametrize(
    "build",
    [whisper_decoder, lambda: language_decoder(True), lambda: language_decoder(False)],
    ids=["whisper", "language model", "padded language model"],
)
def test_a_forward_pass_never_waits_for_the_device(
    build: Callable[[], nn.Module], padding: Any, monkeypatch: pytest.MonkeyPatch
):
    features = DeviceFeatures(LogMel(80), Augment(AugmentSettings()))
    batch = collate([], [], 80)
    with fake_gpu(monkeypatch):
        with CUDA:
            encoder, teacher = (PackedEncoder(WhisperEncoder(CONFIG), padding) for _ in range(2))
            decoder: Any = build()
        for tensor in (*encoder.parameters(), *teacher.parameters(), *decoder.parameters()):
            tensor.data = tensor.data.bfloat16()
        monkeypatch.setattr(
            teacher, "to", lambda **_: teacher
        )  # `Module.to` cannot replace fake parameters
        batch.targets = placeholder_targets(TEXTS)
        batch.domains, batch.mel_lengths = ("speech",) * 3, tuple(n // 160 for n in SAMPLES)
        batch.padded = (False, True, False)
        bits = torch.zeros(sum(SAMPLES), dtype=torch.int32)
        batch.waveforms = Waveforms(bits, SAMPLES, (0, 1, 2))
        features.logmel.to(CUDA)
        with NoWaiting():
            batch = features(batch.to(CUDA))
            frames = encoder(batch.mel, batch.mel_lengths, keep_states=True)
            loss = decoder.loss(frames.values, frames.lengths, batch.targets)
            result = MicroBatchResult((), loss.token_nll.float(), loss.correct, loss.counts)
            distance = Distillation(teacher, 1.0, [2], ["speech"])(batch, frames)
            outputs = (loss.total, result.sums(), distance)
    assert [value.device if value is not None else None for value in outputs] == [CUDA] * 3
    assert frames.values.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: x.tolist(), DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.cpu(), AssertionError),
        (lambda x: torch.arange(4).to(CUDA), AssertionError),
        (lambda x: x + torch.arange(4), Exception),
    ],
    ids=["item", "tolist", "mask", "to host", "blocking copy", "mixed devices"],
)
def test_the_check_finds_what_waits(
    wait: Callable[[Tensor], Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    with fake_gpu(monkeypatch):
        values = torch.empty(4, device=CUDA)
        with pytest.raises(error), NoWaiting():
            wait(values)


class ReadCounter(TorchDispatchMode):
    """Counts the values that the host reads in each step, which ends where the next one begins."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.reads and func is torch.ops.aten._local_scalar_dense.default:
            self.reads[-1] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_value_unless_metrics_are_due(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Forward, backward, clipping, update, schedule and all callbacks of the real Trainer."""
    counter = ReadCounter()
    begin = LambdaCallback(on_train_batch_start=lambda *_: counter.reads.append(0))
    add_callbacks(monkeypatch, begin)
    # A worker decodes, so that this process reads nothing of the data.
    names = ("log_every_steps=4", "valid_every_steps=6", "checkpoint_every_steps=6")
    options = ("data.workers=1", *(f"trainer.{name}" for name in names))
    with counter:
        train(settings_for(tiny_whisper, tiny_shards, tmp_path, *options), QUIET)
    assert [count > 0 for count in counter.reads] == [False] * 3 + [True, False, True]


@pytest.mark.gpu
def test_steps_on_a_gpu_do_not_synchronise(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Strict(lightning.Callback):
        """Lets PyTorch raise when a step that is not logged waits for the GPU."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step in (1, 2) else "default")

    add_callbacks(monkeypatch, Strict())
    options = ("trainer.log_every_steps=6", "trainer.valid_every_steps=6", "hardware=auto")
    train(settings_for(tiny_whisper, tiny_shards, tmp_path, *options), QUIET)
