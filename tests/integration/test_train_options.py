"""Options of the training that change what is learned: each resumes exactly and exports an encoder
that transformers loads.
"""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoFeatureExtractor, WhisperModel

from tests.support.training import QUIET, assert_same_weights, settings_for, weights_of
from whisper_aut.cli import main
from whisper_aut.config import load_settings
from whisper_aut.errors import UserError
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.loading import open_run
from whisper_aut.probes.results import Scores
from whisper_aut.training.checkpoint import read_weights
from whisper_aut.training.factory import build_trained
from whisper_aut.training.train import build_parts, train

OPTIONS = {
    "padding": ("model.pad_to_30s=0.4",),
    "average": ("optim.ema_decay=0.5",),
    "lora": ("model.lora_rank=4", "distillation.weight=1", "model.gradient_checkpointing=true"),
    "fusion": ("decoder=causal_lm", "decoder.adapter.layers=[0, 1, 2]"),
    "loss": ("loss.per=clip", "loss.domains={music: 3.0}"),
    "prompts": (
        "decoder.supervise_prompt=[speech]",
        "decoder.prompts.sound={task: caption, language: en, text: Sounds of rain.}",
    ),
}


COMMON = ("optim.lr=3e-3", "optim.warmup_steps=0", "trainer.max_steps=4")
COMMON += ("trainer.checkpoint_every_steps=2", "trainer.keep_checkpoints=3")


@pytest.fixture(scope="module")
def plain_fingerprint(
    tiny_whisper: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Of the encoder that is trained without any of the options."""
    folder = tmp_path_factory.mktemp("plain")
    run = train(settings_for(tiny_whisper, tiny_shards, folder, *COMMON), QUIET).run
    assert main(["export", str(run.path), "--out", str(folder / "export")]) == 0
    return load_encoder(folder / "export", padding="30s").fingerprint()


@pytest.mark.parametrize("option", OPTIONS)
def test_it_resumes_exactly_and_exports_a_drop_in(
    option: str,
    plain_fingerprint: str,
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    tiny_language_model: Path,
):
    options = OPTIONS[option]
    if option == "fusion":
        options += (f"decoder.language_model={tiny_language_model}",)
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *COMMON, *options)
    run = train(settings, QUIET).run
    whole = weights_of(run)
    train(settings, QUIET, resume=str(run.checkpoints / "step-0000002.ckpt"))
    assert_same_weights(weights_of(run), whole, atol=1e-6)
    out = tmp_path / "export"
    assert main(["export", str(run.path), "--out", str(out)]) == 0
    ours, (theirs, loading) = (
        load_encoder(out, padding="30s"),
        WhisperModel.from_pretrained(out, output_loading_info=True),
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    clip = np.random.default_rng(0).standard_normal(12_000).astype("float32") * 0.1
    features = AutoFeatureExtractor.from_pretrained(out)(
        clip, sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        expected = theirs.encoder(features.input_features).last_hidden_state[0, :38]
    assert_close(ours.encode([clip], 16_000)[0], expected, atol=1e-4, rtol=1e-4)
    assert ours.fingerprint() != plain_fingerprint


def test_the_scale_of_low_rank_updates_stays_over_a_resume(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    """Exports merge the updates with the scale in the checkpoint."""
    whole, half = (
        settings_for(tiny_whisper, tiny_shards, tmp_path, *COMMON, "model.lora_rank=4", chosen)
        for chosen in ("model.lora_alpha=32", "model.lora_alpha=16")
    )
    checkpoint = train(whole, QUIET).run.checkpoints / "step-0000002.ckpt"
    with pytest.raises(UserError, match=r"lora_alpha / lora_rank = 8, but this config has 4"):
        train(half, QUIET, resume=str(checkpoint))


@pytest.mark.parametrize("per", ["token", "clip"])
def test_the_loss_is_the_weighted_mean_of_tokens_or_of_clips(
    per: str, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    options = [f"loss.per={per}", "loss.domains={music: 3.0}", "trainer.accumulate=2"]
    options += ["data.domains={speech: 1, sound: 1, music: 1}"]
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *options)
    parts = build_parts(settings, None)
    module = parts.module.eval()
    step = list(islice(parts.data.train_dataloader(), 2))
    losses, weights = [], []
    found = 0.0
    for batch in step:
        loss = module(batch)[1]
        found += float(loss.total) / batch.step_weight
        for domain, nll in zip(batch.domains, loss.token_nll.split(loss.counts), strict=True):
            factor = 3.0 if domain == "music" else 1.0
            losses += [factor * float(nll.mean() if per == "clip" else nll.sum())]
            weights += [factor * (1 if per == "clip" else len(nll))]
    assert {domain for batch in step for domain in batch.domains} >= {"speech", "music"}
    assert found == pytest.approx(sum(losses) / sum(weights), rel=1e-5)


def test_a_decoder_that_takes_no_weights_is_an_error(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, "loss.per=clip")
    parts = build_parts(settings, None)
    batch = next(iter(parts.data.train_dataloader()))
    targets = replace(batch.targets, weights=())
    loss = parts.module.decoder.loss
    parts.module.decoder.loss = lambda frames, lengths, _: loss(frames, lengths, targets)
    with pytest.raises(UserError, match=r"WhisperDecoder ignores targets.label_weights"):
        parts.module(batch)


def test_the_fraction_of_an_interpolation_is_chosen_on_validation(
    in_pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, out, kind = "runs/aut_tiny/latest", tmp_path / "curve", ["--kind", "knn"]
    probed = ["--tasks", "tones.yaml", "--root", "data", *kind]
    command = ["interpolate", run, *probed, "--fractions", "1", "0", "0.5", "--out", str(out)]
    assert main(command) == 0
    found = json.loads((out / "interpolation.json").read_text())
    ((task, curve),) = found["scores"].items()
    assert list(curve) == ["0.0", "0.5", "1.0"]
    assert found["best"] == float(max(curve, key=lambda fraction: curve[fraction][0]))
    assert f"--interpolate {found['best']:g}" in " ".join(capsys.readouterr().out.split())
    assert (out / "interpolation.png").stat().st_size > 5000
    half = tmp_path / "half"
    assert main(["export", run, "--out", str(half), "--interpolate", "0.5"]) == 0
    assert main(["probe", str(half), *probed, "--out", str(tmp_path / "probe")]) == 0
    (entry,) = Scores.load(tmp_path / "probe" / "scores.json").entries
    assert (entry.task, entry.mean) == (task, curve["0.5"][1])
    assert np.mean(entry.valid_scores) == pytest.approx(curve["0.5"][0])  # pyright: ignore


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decoder.supervise_prompt=[rain]"], "decoder.supervise_prompt: 'rain' is not one of"),
        (["decoder.max_tokens=8", "decoder.prompts.sound={text: a dog barks}"], "leave no room"),
    ],
)
def test_prompts_that_cannot_be_used(
    overrides: list[str], message: str, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=message):
        build_parts(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), None)


def test_averaged_weights_are_validated_and_exported(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    options = ("optim.ema_decay=0.7", "optim.lr=1e-2", "optim.warmup_steps=0")
    options += ("trainer.checkpoint_every_steps=1", "trainer.keep_checkpoints=9")
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *options)
    start = dict(build_parts(settings, None).module.named_parameters())
    run = train(settings, QUIET).run
    expected = {name: weight.detach() for name, weight in start.items() if weight.requires_grad}
    for step in range(1, 7):
        weights = read_weights(run.checkpoints / f"step-000000{step}.ckpt")
        expected = {n: 0.7 * value + 0.3 * weights[n] for n, value in expected.items()}
    found = weights_of(run)
    for name, value in expected.items():
        assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert not torch.equal(
        found["encoder.whisper.conv1.weight"], weights["encoder.whisper.conv1.weight"]
    )
    losses = []
    for chosen in (found, weights):
        trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        data, module = build_parts(settings, None).data, build_trained(settings, chosen)
        (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
        losses.append(metrics["valid/loss"])
    logged = json.loads(run.done.read_text())["metrics"]["valid/loss"]
    assert logged == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3


def test_fused_layers_reach_the_language_model_and_their_weights_stay_in_the_run(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, tiny_language_model: Path
):
    options = ["decoder=causal_lm", f"decoder.language_model={tiny_language_model}"]
    options += ["decoder.adapter.layers=[1, 2]", "optim.lr=1e-2"]
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *options)
    run = train(settings, QUIET).run
    weights = weights_of(run)
    scores = weights["decoder.fusion.scores"]
    assert scores.shape == (2,)
    assert scores.abs().max() > 0
    module = open_run(run.path)
    batch = next(iter(build_parts(settings, None).data.val_dataloader()))
    states = module.encoder(batch.mel, batch.mel_lengths, keep_states=True).states
    fused = sum(
        weight * torch.nn.functional.layer_norm(state, state.shape[-1:])
        for weight, state in zip(scores.softmax(0), states[1:], strict=True)
    )
    seen = []
    module.decoder.adapter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss = module.eval()(batch)[1]
    assert_close(seen[0], fused, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(loss.token_nll).all()
    for layers in ([0, 1], [2, 2], [9]):
        wrong = settings_for(
            tiny_whisper, tiny_shards, tmp_path, *options, f"decoder.adapter.layers={layers}"
        )
        with pytest.raises(UserError, match=r"decoder.adapter.layers: give different layers from"):
            build_parts(wrong, None)


def test_an_encoder_for_both_padding_modes_says_so(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    settings = settings_for(
        tiny_whisper, tiny_shards, tmp_path, "model.pad_to_30s=0.4", "trainer.max_steps=2"
    )
    run = train(settings, QUIET).run
    metrics = json.loads(run.done.read_text())["metrics"]
    assert 0.7 < metrics["throughput/padding_fraction"] < 0.99
    out = tmp_path / "export"
    assert main(["export", str(run.path), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["trained_padding"], config["trained_pad_to_30s"]) == ("none", 0.4)
    encoder = load_encoder(out)
    assert encoder.padding == "none"
    assert encoder.trained_padding == "none, 30s for 0.4 of the clips"
    assert load_encoder(f"{out}@30s").trained_padding == encoder.trained_padding
    assert load_encoder(out, random_init=True).trained_padding == ""
    assert load_encoder(tiny_whisper).trained_padding == "30s"
    assert "of which 0.4 were padded to 30 s" in " ".join((out / "README.md").read_text().split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.padding=30s", "model.pad_to_30s=0.1"], "pad_to_30s: needs padding=none"),
        (["model.random_init=true", "model.interpolate=0.5"], "interpolate: a model that starts"),
        (["model.random_init=true", "distillation.weight=1"], "distillation.weight: needs pre"),
        (["model.freeze_encoder=true", "distillation.weight=1"], "distillation.weight: needs pre"),
        (["model.pad_to_30s=1.5"], "model.pad_to_30s"),
        (
            ["model.pad_to_30s=0.1", "data.max_seconds=10", "data.batch_seconds=20"],
            "data.batch_seconds: 20 is below the 30 s",
        ),
        (["optim.ema_decay=0.9", "strategy=deepspeed_stage_3"], "stage_3 shards the weights"),
        (["model.lora_rank=4", "model.freeze_encoder=true"], "lora_rank: does not go with"),
        (["loss.per=word"], "loss.per: must be 'token' or 'clip'"),
        (["loss.domains={music: 0}"], "loss.domains.music: must be greater than 0"),
        (["loss.domains={rain: 1}"], "loss.domains"),
        (["export=[]"], "probe.tasks: probes score the exported encoder"),
    ],
)
def test_options_that_do_not_go_together(overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load_settings("aut", overrides)
