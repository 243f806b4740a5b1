"""Distillation: distances against a naive computation, and what they do to a training."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.training import QUIET, assert_same_weights, settings_for, weights_of
from whisper_aut.audio.logmel import frames_with_context
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.batch import Example, collate
from whisper_aut.errors import UserError
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.distillation import Distillation, frame_distance
from whisper_aut.models.encoder import PackedEncoder, Padding
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.train import train

DOMAINS = ("speech", "music", "speech")
MEL_LENGTHS = (40, 62, 55)


def module_with(
    whisper: Path, padding: Padding = "none", layers: tuple[int, ...] = (2,)
) -> AudioTextModule:
    """Return a module whose encoder has moved away from its teacher."""
    start = PretrainedWhisper(str(whisper))
    entry, options = check_decoder({"name": "whisper"})
    decoder, codec = entry.build(start, options, False)
    encoder = PackedEncoder(start.encoder, padding)
    teacher = PackedEncoder(copy.deepcopy(start.encoder), padding)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    distillation = Distillation(teacher, 0.5, layers, ("speech",))
    return AudioTextModule(encoder, decoder, codec, distillation=distillation)


def batch_for(module: AudioTextModule, domains: tuple[str, ...] = DOMAINS):
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(
            torch.randn(frames_with_context(length), 80, generator=generator),
            length,
            module.codec.encode(Annotation(text="rain " * (position + 1)), domain, position),
            domain,
            "",
            str(position),
        )
        for position, (length, domain) in enumerate(zip(MEL_LENGTHS, domains, strict=True))
    ]
    return collate(examples, [], 80)


def naive_distance(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(s, t, strict=True))
        lengths = [sum(a * a for a in vector) ** 0.5 for vector in (s, t)]
        squares = sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        total += 1 - dot / (lengths[0] * lengths[1]) + squares / lengths[1] ** 2
    return total / len(student)


def test_the_distance_of_a_frame():
    student, teacher = (
        torch.tensor([[1.0, 0.0], [3.0, 4.0]]),
        torch.tensor([[0.0, 2.0], [3.0, 4.0]]),
    )
    assert frame_distance(student, teacher).tolist() == pytest.approx([1 + 5 / 4, 0])


@pytest.mark.parametrize(("padding", "mixed"), [("none", False), ("none", True), ("30s", False)])
@torch.no_grad()
def test_the_loss_grows_by_the_distance_of_each_compared_clip(
    life_size_whisper: Path, padding: Padding, mixed: bool
):
    module = module_with(life_size_whisper, padding, layers=(0, 2)).train()
    batch = batch_for(module)
    batch.padded = (False, mixed, mixed)
    assert module.distillation
    teacher = PackedEncoder(PretrainedWhisper(str(life_size_whisper)).encoder, padding)
    expected = 0.0
    mel = batch.mel.split([frames_with_context(length) for length in MEL_LENGTHS])
    for clip, length, domain, tokens, padded in zip(
        mel, MEL_LENGTHS, DOMAINS, batch.targets.counts, batch.padded, strict=True
    ):
        found = [
            encoder(clip, [length], keep_states=True, padded=[padded])
            for encoder in (module.encoder, teacher)
        ]
        for layer in (0, 2):
            student, target = (frames.states[layer][: -(-length // 2)] for frames in found)
            expected += (domain == "speech") * tokens * naive_distance(student, target) / 2
    distance = float(module(batch)[1].total)
    module.distillation = None
    assert distance - float(module(batch)[1].total) == pytest.approx(0.5 * expected, rel=1e-4)


@torch.no_grad()
def test_clips_of_other_domains_and_validation_have_no_distance(life_size_whisper: Path):
    module = module_with(life_size_whisper)
    distillation = module.distillation
    assert distillation
    music = batch_for(module, ("music",) * 3)
    assert distillation.compared(music) == []
    losses = {}
    for name, own in (("with", distillation), ("without", None)):
        module.distillation = own
        losses[name] = (
            float(module.train()(music)[1].total),
            float(module.eval()(batch_for(module))[1].total),
        )
    assert losses["with"] == losses["without"]


def test_the_teacher_is_neither_trained_nor_saved(life_size_whisper: Path):
    module = module_with(life_size_whisper).train()
    assert module.distillation
    names = dict(module.named_parameters())
    assert not any("teacher" in name for name in (*names, *module.state_dict()))
    module(batch_for(module))[1].total.backward()
    assert all(p.grad is None for p in module.distillation.teacher.parameters())
    assert module.encoder.whisper.conv1.weight.grad is not None


def test_a_training_stays_closer_to_its_start_and_resumes_exactly(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    common = (tiny_whisper, tiny_shards)
    settings = ("optim.lr=3e-3", "optim.warmup_steps=0", "trainer.max_steps=6")
    plain = train(settings_for(*common, tmp_path / "plain", *settings), QUIET).run
    settings += ("distillation.weight=20", "distillation.layers=[1, 2]")
    settings += ("distillation.domains=[speech, sound, music]",)
    settings += ("trainer.checkpoint_every_steps=3", "trainer.keep_checkpoints=3")
    distilled = settings_for(*common, tmp_path / "distilled", *settings)
    run = train(distilled, QUIET).run
    whole = weights_of(run)
    start = PretrainedWhisper(str(tiny_whisper)).encoder.state_dict()

    def moved(weights: dict[str, Tensor]) -> float:
        prefix = "encoder.whisper."
        return sum(float((weights[prefix + name] - start[name]).norm()) for name in start)

    assert moved(whole) < 0.9 * moved(weights_of(plain))
    resumed = train(distilled, QUIET, resume=str(run.checkpoints / "step-0000003.ckpt")).run
    assert_same_weights(weights_of(resumed), whole, atol=1e-6)


def test_layers_that_the_encoder_does_not_have_are_an_error(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    options = ("distillation.weight=1", "distillation.layers=[3]")
    with pytest.raises(UserError, match=r"distillation.layers: the encoder has layers 0 to 2, not"):
        train(settings_for(tiny_whisper, tiny_shards, tmp_path, *options), QUIET)
