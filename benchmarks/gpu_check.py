"""The parts of `gpu_check.sh`: each measures one thing on one device and appends JSON lines.

In: random weights in the shapes of whisper-large-v3 and Qwen3-0.6B, and shards of noise, which
`prepare` writes. Out: `results.jsonl`, one line per figure, and from `table` a summary for
RESULTS.md.
The training parts run `conf/aut.yaml` and `conf/uniwhisper.yaml` through `training.train`: 5 steps
to warm up and 15 that count. On a CPU all shapes are tiny.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import soundfile
import torch
from pairs import machine
from recipes import Clips, HuggingFaceStep
from rich.console import Console
from torch import Tensor
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from whisper_aut.audio.decode import SAMPLE_RATE_HZ
from whisper_aut.cli import main as command
from whisper_aut.config import load_settings
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.sampler import Cursor
from whisper_aut.data.writer import ShardWriter
from whisper_aut.models.attention import Segments, clip_attention, use_flash_attention_3
from whisper_aut.models.language_model import KNOWN_CONFIGS
from whisper_aut.models.tiny import make_whisper, train_chat_tokenizer
from whisper_aut.report.plots import read_metrics
from whisper_aut.training import train as train_module
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints
from whisper_aut.training.factory import build_data, build_decoder, build_pretrained
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.training.train import train

CONF = Path(__file__).parents[1] / "conf"
WARM_UP, STEPS = 5, 15
WORDS = ("dog", "barks", "while", "rain", "falls", "and", "someone", "plays", "the", "piano")
LARGE: dict[str, Any] = {
    "d_model": 1280,
    "encoder_layers": 32,
    "decoder_layers": 32,
    "encoder_attention_heads": 20,
    "decoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "decoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "vocab_size": 51_866,
}
# Options of the recipes that only a rehearsal on a CPU changes.
TINY = (
    "hardware=cpu",
    "hardware.precision=bf16-mixed",
    "data.batch_seconds=30",
    "data.workers=0",
    "data.partitions=1",
)


class Check:
    """Device, sizes and files of all parts."""

    def __init__(self, device: str, out: Path):
        self.device = torch.device("cuda", 0) if device == "gpu" else torch.device("cpu")
        self.tiny, self.out = device != "gpu", out
        self.whisper, self.language = out / "whisper", out / "language_model"
        self.small, self.shards = out / "small_whisper", out / "shards"
        # Seconds of the clips: 10 on average.
        self.seconds = (0.5, 2.0) if self.tiny else (4.0, 16.0)

    def add(self, part: str, figure: str, value: float | str, unit: str = "") -> None:
        row = {"part": part, "figure": figure, "value": value, "unit": unit}
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def median_seconds(self, action: Callable[[], Any], runs: int) -> float:
        action()
        times = []
        for _ in range(runs):
            begin = self.now()
            action()
            times.append(self.now() - begin)
        return statistics.median(times)


def prepare(check: Check) -> None:
    """Write shards of noise, a small Whisper, and configs and tokenizers of the large models."""
    for folder in (check.whisper, check.language, check.small, check.shards, check.out / "runs"):
        shutil.rmtree(folder, ignore_errors=True)
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 20)) for _ in range(16 if check.tiny else 400)]
    with ShardWriter(check.shards) as shards:
        for number, text in enumerate(texts):
            seconds = float(random.uniform(*check.seconds))
            noise = random.standard_normal(round(seconds * SAMPLE_RATE_HZ), np.float32) * 0.1
            audio = BytesIO()
            soundfile.write(audio, noise, SAMPLE_RATE_HZ, format="FLAC")
            annotation = Annotation(
                text=text, domain="speech", duration_seconds=seconds, id=str(number)
            )
            shards.write(f"{number:04d}", "flac", audio.getvalue(), annotation)
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "heads": 2}
    bins = 80 if check.tiny else 128
    make_whisper(check.small, texts, **sizes, num_mel_bins=bins, vocabulary=400, seed=0)
    shutil.copytree(check.small, check.whisper)
    if not check.tiny:  # random weights are drawn when the model is built
        config = WhisperConfig.from_pretrained(check.small)
        config.update(LARGE)
        config.save_pretrained(check.whisper)
        (check.whisper / "model.safetensors").unlink()
    tokenizer = train_chat_tokenizer([*texts, "Describe the sound."], 400)
    tokenizer.save_pretrained(check.language)
    config = KNOWN_CONFIGS["Qwen/Qwen3-0.6B"].to_dict()
    if check.tiny:
        layers = {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": len(tokenizer)}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        config |= {**layers, **heads, "hidden_size": 64, "layer_types": None}
    with check.device:
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config.from_dict(config)).bfloat16()
    model.save_pretrained(check.language)
    check.add("machine", "description", machine())


def attention(check: Check) -> None:
    """The packed attention against one SDPA call per clip in float32: outputs, gradients, time."""
    heads, width, clips = (2, 8, 3) if check.tiny else (20, 64, 64)
    kernels = "FlashAttention-3" if use_flash_attention_3() else "PyTorch's"
    check.add("attention", "kernels", kernels)
    lengths = [int(n) for n in np.random.default_rng(0).integers(40, 800, clips)]
    torch.manual_seed(0)
    shape = (4, sum(lengths), heads, width)
    q, keys, values, gradient = torch.randn(shape, device=check.device).bfloat16()
    segments = Segments.of(lengths, lengths, check.device)
    for name, causal, groups in (("full", False, 1), ("causal", True, 1), ("grouped", True, 2)):
        k, v = keys[:, ::groups].contiguous(), values[:, ::groups].contiguous()
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def packed(causal: bool = causal, leaves: Sequence[Tensor] = leaves) -> Tensor:
            out = clip_attention(leaves[0], leaves[1], leaves[2], segments, causal=causal)
            out.backward(gradient)
            return out

        def each_clip(tensors: Sequence[Tensor], gradient: Tensor, causal: bool = causal) -> Tensor:
            parts = zip(*(x.split(lengths) for x in tensors), strict=True)
            outs = [_sdpa(q, k, v, causal) for q, k, v in parts]
            out = torch.cat(outs)
            out.backward(gradient)
            return out

        exact = [x.float().requires_grad_() for x in (q, k, v)]
        expected = each_clip(exact, gradient.float())
        out = packed()
        check.add("attention", f"{name}: error of outputs", _error(out, expected), "relative")
        errors = [_error(x.grad, y.grad) for x, y in zip(leaves, exact, strict=True)]
        check.add("attention", f"{name}: error of gradients", max(errors), "relative")
        worst = max(_error(out, expected), *errors)
        if not worst < 0.02:
            raise AssertionError(f"attention differs from SDPA in float32: {worst}")
        seconds = check.median_seconds(packed, 10)
        check.add("attention", f"{name}: packed", 1e3 * seconds, "ms")
        half = [x.clone().requires_grad_() for x in (q, k, v)]
        seconds = check.median_seconds(lambda half=half: each_clip(half, gradient), 3)
        check.add("attention", f"{name}: SDPA of each clip", 1e3 * seconds, "ms")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return attended[0].transpose(0, 1)


def _error(one: Any, other: Any) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def overrides(check: Check, name: str, *chosen: str) -> list[str]:
    """Return the overrides with which a recipe trains on the shards of noise."""
    source = f"{{path: {check.shards}, domain: speech}}"
    return [
        f"name={name}",
        f"runs={check.out / 'runs'}",
        f"data.train=[{source}]",
        "data.valid=[]",
        "data.domains={speech: 1, sound: 0, music: 0}",
        "data.samples_per_epoch=100000",
        "export=[]",
        "probe.tasks=[]",
        *(TINY if check.tiny else ("hardware=1xgpu", "data.partitions=8")),
        *chosen,
    ]


def worker(check: Check) -> None:
    """What one core decodes and packs, with log-mels and without, in seconds of CPU time."""
    torch.set_num_threads(1)
    for features in ("workers", "device"):
        small = (f"model.path={check.small}", f"data.features={features}", "data.workers=0")
        settings = load_settings(CONF / "aut.yaml", overrides(check, "worker", *small))
        pretrained = build_pretrained(settings)
        codec = build_decoder(settings, pretrained)[1]
        data = build_data(settings, codec, pretrained.config.num_mel_bins)
        batches = iter(data.train_stream(0, 1, Cursor(), None, 2 if check.tiny else 5))
        next(batches)
        begin = time.process_time()
        audio = sum(batch.audio_seconds for batch in batches)
        name = "log-mels" if features == "workers" else "waveforms only"
        check.add("worker", name, audio / (time.process_time() - begin), "audio-s per core-s")


def training(check: Check, part: str, recipe: str, *chosen: str, profile: bool = False) -> None:
    """Train with a recipe, without checkpoints, and record its throughput after the warm-up."""
    steps = WARM_UP + STEPS
    options = [
        "model.random_init=true",
        f"model.path={check.whisper}",
        f"trainer.max_steps={steps + (5 if profile else 0)}",
        f"trainer.log_every_steps={WARM_UP}",
        *((f"trainer.profile_after={steps + 1}",) if profile else ()),
    ]
    settings = load_settings(CONF / recipe, overrides(check, part, *options, *chosen))
    begin = time.perf_counter()
    # A checkpoint of large-v3 has 18 GB, which are not what is measured.
    with (
        mock.patch.object(RollingCheckpoints, "save", lambda self, trainer: self.folder),
        mock.patch.object(train_module, "check_disk_space", return_value=""),
    ):
        run = train(settings, Console(), fresh=True).run
    check.add(part, "whole part", time.perf_counter() - begin, "s")
    values = read_metrics(run.metrics)
    for name, unit in (
        ("audio_seconds_per_second", "audio-s/s"),
        ("mfu", ""),
        ("hfu", ""),
        ("teraflops", "TFLOP/s"),
        ("data_wait_fraction", ""),
        ("peak_memory_gib", "GiB"),
    ):
        counted = [
            value for step, value in values.get(f"throughput/{name}", []) if WARM_UP < step <= steps
        ]
        if counted:
            check.add(part, name, statistics.median(counted), unit)
    losses = [value for _, value in values["train/loss"]]
    check.add(part, "last loss", losses[-1])
    if not np.isfinite(losses).all():
        raise AssertionError(f"the loss is not finite: {losses}")
    for trace in (run.path / "profile").glob("*"):
        shutil.copy(trace, check.out / f"{part}-{trace.name}")


def aut(check: Check) -> None:
    training(check, "aut", "aut.yaml", "strategy=auto", profile=True)


def aut_compiled(check: Check) -> None:
    training(check, "aut_compiled", "aut.yaml", "strategy=auto", "model.compile=true")


def aut_zero2(check: Check) -> None:
    if find_spec("deepspeed") is None:
        check.add("aut_zero2", "skipped", "deepspeed is not installed")
        return
    training(check, "aut_zero2", "aut.yaml", "strategy=deepspeed_stage_2")


def aut_fsdp(check: Check) -> None:
    training(check, "aut_fsdp", "aut.yaml", "strategy=fsdp")


def uniwhisper(check: Check) -> None:
    language = (f"decoder.language_model={check.language}", "decoder.dtype=bfloat16")
    training(
        check,
        "uniwhisper",
        "uniwhisper.yaml",
        "strategy=auto",
        "optim.encoder_after_step=0",
        *language,
    )


def hugging_face(check: Check) -> None:
    """The recipe of Hugging Face's fine-tuning guide in bfloat16 autocast: clips padded to 30 s."""
    count = 2 if check.tiny else 16
    seconds = np.random.default_rng(0).uniform(*check.seconds, count)
    config = WhisperConfig.from_pretrained(check.whisper)
    clips = Clips.noise([float(s) for s in seconds], 24, config.vocab_size)
    with check.device:
        model = WhisperForConditionalGeneration(config).train()
    step = HuggingFaceStep(model, clips, extract_once=True)
    del model
    autocast: Any = torch.autocast(check.device.type, torch.bfloat16)
    with autocast if not check.tiny else nullcontext():
        taken = check.median_seconds(step.step, 2 if check.tiny else STEPS)
    check.add("hugging_face", "audio_seconds_per_second", sum(seconds) / taken, "audio-s/s")
    check.add("hugging_face", "step", taken, "s")
    if check.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        check.add("hugging_face", "peak_memory_gib", peak, "GiB")


def resume(check: Check) -> None:
    """A small model: six steps, the last three again from a checkpoint, and the export."""
    folder, steps = check.out / "runs" / "resume", ("max_steps=6", "checkpoint_every_steps=3")
    options = [
        *overrides(check, "resume", f"model.path={check.small}", "strategy=auto"),
        *(f"trainer.{step}" for step in (*steps, "log_every_steps=1", "keep_checkpoints=9")),
        "trainer.valid_every_steps=6",
    ]
    config = CONF / "aut.yaml"
    run = train(load_settings(config, options), Console(), fresh=True).run
    whole = [value for _, value in read_metrics(run.metrics)["train/loss"]]
    checkpoint = str(run.checkpoints / "step-0000003.ckpt")
    again = load_settings(config, [*options, "trainer.generate_clips=1"])
    run = train(again, Console(), resume=checkpoint).run
    resumed = [value for _, value in read_metrics(RunDirectory(run.path).metrics)["train/loss"]]
    difference = max(abs(a - b) for a, b in zip(whole[3:], resumed[3:], strict=True))
    check.add("resume", "largest difference of a loss", difference, "nats")
    status = command(["export", str(run.path), "--out", str(folder / "export")])
    check.add("resume", "exit status of the export", status)
    if status or not difference < 0.05:
        raise AssertionError("the resumed run or its export failed")


def failed(check: Check, part: str, status: str, limit: str) -> None:
    reason = f"over {limit} s" if status in ("124", "137") else f"exit status {status}"
    check.add(part, "failed", f"{reason}; see {part}.log")


def table(check: Check) -> None:
    """Print all results as the table for RESULTS.md."""
    lines = (check.out / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (description,) = (row["value"] for row in rows if row["part"] == "machine")
    text = [f"\n## gpu_check\n{description}\n", "| part | figure | value | unit |"]
    text.append("|:---|:---|---:|:---|")
    for row in rows:
        if row["part"] != "machine":
            value = row["value"]
            shown = f"{value:.4g}" if isinstance(value, float) else value
            text.append(f"| {row['part']} | {row['figure']} | {shown} | {row['unit']} |")
    print("\n".join(text))
    (check.out / "table.md").write_text("\n".join(text) + "\n")


PARTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        *(prepare, attention, worker, aut, aut_compiled, aut_zero2, aut_fsdp, uniwhisper),
        *(hugging_face, resume, failed, table),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    options = parser.parse_args()
    if options.device == "gpu" and not torch.cuda.is_available():
        sys.exit("gpu_check: PyTorch finds no GPU. Rehearse with --device cpu.")
    if options.device == "cpu":
        torch.set_num_threads(1)
    PARTS[options.part](Check(options.device, options.out.absolute()), *options.arguments)


if __name__ == "__main__":
    main()
