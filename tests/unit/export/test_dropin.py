"""The exported encoder in models of transformers: identical frames, and a working `generate`."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    AutoModel,
    Qwen2_5OmniAudioEncoderConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    VoxtralConfig,
    VoxtralEncoderConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
    pipeline,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

from tests.support import REPOSITORY
from tests.support.audio import encode_audio, tone
from tests.support.numeric import assert_frames_close
from whisper_aut import load_encoder
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.errors import UserError
from whisper_aut.export.hf import KINDS, ExportKind
from whisper_aut.export.towers import check_tower, swap_tower
from whisper_aut.loading import export_run, open_run
from whisper_aut.models.encoder import OwnLengthEncoder

RUN = Path("runs/aut_tiny/latest")
AUDIO_TOKEN, VOCABULARY = 7, 64
SIZES = {"encoder_layers": 2, "encoder_attention_heads": 2, "num_mel_bins": 80}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    **HEADS,
}


@pytest.fixture(scope="module")
def run(pipeline_run: Path) -> Path:
    return pipeline_run / RUN


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    noise = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * 0.1
    return [tone(1.0) + noise[:16_000], noise]


def features(run: Path, clips: list[np.ndarray], mask: bool = False) -> dict[str, Tensor]:
    extractor = WhisperFeatureExtractor.from_pretrained(run / "export" / "encoder")
    return dict(
        extractor(clips, sampling_rate=16_000, return_tensors="pt", return_attention_mask=mask)
    )


def before_norm(run: Path, clips: list[np.ndarray], padding: str) -> list[Tensor]:
    """Return the input of our encoder's last norm, `[T, D]` per clip, where towers pool."""
    encoder = load_encoder(run, padding=padding).encoder
    seen: list[Tensor] = []
    encoder.whisper.layer_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logmel = LogMel(80)
    with torch.no_grad():
        frames = encoder(
            torch.cat([logmel(torch.from_numpy(c)) for c in clips]),
            [mel_frames(len(c)) for c in clips],
        )
    return list(seen[0].split(frames.lengths))


@torch.no_grad()
def test_in_whisper(run: Path, tiny_whisper: Path, clips: list[np.ndarray]):
    model = WhisperForConditionalGeneration.from_pretrained(tiny_whisper).eval()
    model.model.encoder = WhisperModel.from_pretrained(run / "export" / "encoder").encoder
    mel = features(run, clips)["input_features"]
    theirs = model.model.encoder(mel).last_hidden_state
    for clip, other in zip(
        load_encoder(run, padding="30s").encode(clips, 16_000), theirs, strict=True
    ):
        assert_frames_close(clip, other[: len(clip)])
    assert model.generate(mel, language="en", task="transcribe", max_new_tokens=5).shape[0] == 2


@torch.no_grad()
def test_in_auto_model(run: Path, clips: list[np.ndarray]):
    model, info = AutoModel.from_pretrained(run / "export" / "encoder", output_loading_info=True)
    assert not any(info.values()), info
    theirs = model.encoder(features(run, clips)["input_features"]).last_hidden_state
    for ours, other in zip(
        load_encoder(run, padding="30s").encode(clips, 16_000), theirs, strict=True
    ):
        assert_frames_close(ours, other[: len(ours)])


def test_at_their_own_length_in_transformers(run: Path, clips: list[np.ndarray]):
    """`OwnLengthEncoder` gives our frames at padding `none`, and gradients reach the weights."""
    model = WhisperForConditionalGeneration.from_pretrained(run / "export" / "whisper").eval()
    model.model.encoder = encoder = OwnLengthEncoder(model.model.encoder)
    given = features(run, clips, mask=True)
    theirs = encoder(**given).last_hidden_state
    ours = load_encoder(run, padding="none").encode(clips, 16_000)
    assert theirs.shape[:2] == (2, max(map(len, ours)))
    for clip, other in zip(ours, theirs, strict=True):
        assert_frames_close(other[: len(clip)].detach(), clip)
        assert not other[len(clip) :].any()
    theirs.sum().backward()
    assert encoder.conv1.weight.grad.norm() > 0
    trained = open_run(run)
    with torch.no_grad():
        one = features(run, clips[1:], mask=True)
        ids = torch.tensor([[trained.decoder.whisper.config.decoder_start_token_id, 5, 6]])
        logits = model(encoder_outputs=encoder(**one), decoder_input_ids=ids).logits
        decoder = trained.decoder.whisper
        decoded = decoder(ids, encoder_hidden_states=ours[1][None]).last_hidden_state
    assert_frames_close(logits[0], decoded[0] @ decoder.embed_tokens.weight.T)
    assert model.generate(**one, language="en", task="transcribe", max_new_tokens=5).shape[0] == 1
    with pytest.raises(ValueError, match="return_attention_mask=True"):
        encoder(given["input_features"])
    extractor = WhisperFeatureExtractor.from_pretrained(run / "export" / "whisper")
    options = {"padding": "longest", "return_attention_mask": True, "return_tensors": "pt"}
    with pytest.raises(ValueError, match="default padding"):
        encoder(**extractor(clips, sampling_rate=16_000, **options))


@pytest.mark.parametrize("padding", ["30s", "none"])
def test_in_the_classification_pipeline_after_fitting_a_head(
    padding: str, run: Path, tmp_path: Path
):
    """A fitted head predicts in the pipeline what it predicts from our frames."""
    folder, names = run / "export" / "encoder", ("low", "high")
    model = WhisperForAudioClassification.from_pretrained(folder, id2label=dict(enumerate(names)))
    masked = padding == "none"
    extractor = WhisperFeatureExtractor.from_pretrained(folder, return_attention_mask=masked)
    if masked:
        model.encoder = OwnLengthEncoder(model.encoder)
    tones = [tone(25.0, hertz) for hertz in (150.0, 3_000.0)]
    given = dict(extractor(tones, sampling_rate=16_000, return_tensors="pt"))
    with torch.no_grad():
        pooled = model.encoder(**given).last_hidden_state.mean(1, keepdim=True)
    head = [*model.projector.parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.Adam(head, lr=0.01)
    for _ in range(400):
        loss = model(encoder_outputs=(pooled,), labels=torch.tensor([0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    if not masked:  # the fitted model is an ordinary one, without code of ours
        model.save_pretrained(tmp_path)
        model = WhisperForAudioClassification.from_pretrained(tmp_path)
    classify = pipeline("audio-classification", model=model.eval(), feature_extractor=extractor)
    encoder = load_encoder(folder, padding=padding)
    for clip, label in zip(tones, names, strict=True):
        found = classify({"raw": clip, "sampling_rate": 16_000})
        assert found[0]["label"] == label
        with torch.no_grad():
            mel = encoder.logmel(torch.from_numpy(clip))
            pooled = model.projector(encoder.encoder(mel, [mel_frames(len(clip))]).values).mean(0)
            expected = model.classifier(pooled).softmax(-1)
        for one in found:
            chance = expected[names.index(one["label"])].item()
            assert one["score"] == pytest.approx(chance, rel=1e-4, abs=1e-6)


def test_in_the_recognition_pipeline(run: Path, clips: list[np.ndarray]):
    recognise = pipeline("automatic-speech-recognition", model=str(run / "export" / "whisper"))
    found = recognise(
        [{"raw": clip, "sampling_rate": 16_000} for clip in clips],
        generate_kwargs={"max_new_tokens": 5},
    )
    assert [type(one["text"]) for one in found] == [str, str]


@torch.no_grad()
def test_in_faster_whisper(
    run: Path, clips: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The command of docs/export.md converts an export for CTranslate2, which runs faster-whisper.

    Encoder and greedy texts agree with transformers.
    """
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters.transformers import main

    page = (REPOSITORY / "docs" / "export.md").read_text()
    command = re.search(r"^ct2-transformers-converter (?:.*\\\n)*.*", page, re.M)
    assert command
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whisper").symlink_to(run / "export" / "whisper")
    monkeypatch.setattr("sys.argv", command[0].replace("\\\n", "").split())
    main()
    assert {"model.bin", "tokenizer.json", "preprocessor_config.json"} <= {
        path.name for path in (tmp_path / "ct2").iterdir()
    }
    converted = ctranslate2.models.Whisper("ct2", compute_type="float32", intra_threads=1)
    mel = features(run, clips[:1])["input_features"]
    encoded = converted.encode(ctranslate2.StorageView.from_array(mel.numpy()), to_cpu=True)
    (ours,) = load_encoder(run, padding="30s").encode(clips[:1], 16_000)
    assert_frames_close(np.array(encoded)[0, : len(ours)], ours)
    model = WhisperForConditionalGeneration.from_pretrained("whisper").eval()
    config = model.generation_config
    prompt = [model.config.decoder_start_token_id, config.lang_to_id["<|en|>"]]
    prompt += [config.task_to_id["transcribe"], config.no_timestamps_token_id]
    (found,) = converted.generate(
        encoded, [prompt], beam_size=1, max_length=len(prompt) + 5, suppress_blank=False
    )
    theirs = model.generate(mel, language="en", task="transcribe", max_new_tokens=5)[0].tolist()
    assert found.sequences_ids[0] == theirs[-len(found.sequences_ids[0]) :]


def tiny_qwen2_audio(**sizes: int) -> Qwen2AudioForConditionalGeneration:
    audio = Qwen2AudioEncoderConfig(**{**SIZES, "d_model": 32, "encoder_ffn_dim": 128, **sizes})
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=Qwen2Config(**TEXT), audio_token_index=AUDIO_TOKEN
    )
    return Qwen2AudioForConditionalGeneration(config).eval()


@torch.no_grad()
def test_in_qwen2_audio(run: Path, clips: list[np.ndarray], tmp_path: Path):
    out = export_run(run, tmp_path / "tower", "qwen2-audio")
    model = swap_tower(tiny_qwen2_audio(), out)
    tower = model.model.audio_tower
    inputs = features(run, clips, mask=True)
    pooled = [nn.functional.avg_pool1d(hidden.T, 2).T for hidden in before_norm(run, clips, "30s")]
    assert_frames_close(
        tower(inputs["input_features"]).last_hidden_state, tower.layer_norm(torch.stack(pooled))
    )
    # The whole model masks the frames after a clip, as our mode `none` does.
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    lengths = [(-(-mel_frames(len(clip)) // 2) - 2) // 2 + 1 for clip in clips]
    width = max(lengths)
    ids = torch.tensor(
        [[1] * (width - length) + [AUDIO_TOKEN] * length + [3] for length in lengths]
    )
    mask = torch.tensor([[0] * (width - length) + [1] * (length + 1) for length in lengths])
    given = {"input_ids": ids, "attention_mask": mask, "input_features": inputs["input_features"]}
    written = model.generate(
        **given, feature_attention_mask=inputs["attention_mask"], max_new_tokens=3, do_sample=False
    )
    assert written.shape[0] == 2
    assert written.shape[1] > width + 1
    for frames, hidden, length in zip(
        seen[0], before_norm(run, clips, "none"), lengths, strict=True
    ):
        expected = tower.layer_norm(nn.functional.avg_pool1d(hidden.T, 2).T)
        assert_frames_close(frames[:length], expected[:length])


def tiny_audio_flamingo_3() -> AudioFlamingo3ForConditionalGeneration:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 80,
    }
    config = AudioFlamingo3Config(
        audio_config=AudioFlamingo3EncoderConfig(**sizes),
        text_config=Qwen2Config(**TEXT),
        audio_token_id=AUDIO_TOKEN,
    )
    return AudioFlamingo3ForConditionalGeneration(config).eval()


@torch.no_grad()
def test_in_audio_flamingo_3(run: Path, clips: list[np.ndarray], tmp_path: Path):
    """Its mask hides what comes after a clip, as our mode `none` does; pairs are averaged."""
    out = export_run(run, tmp_path / "tower", "audio-flamingo-3")
    model = swap_tower(tiny_audio_flamingo_3(), out)
    given = features(run, clips, mask=True)
    inputs = {
        "input_features": given["input_features"],
        "input_features_mask": given["attention_mask"],
    }
    tower = model.model.audio_tower
    theirs = tower(**inputs).last_hidden_state
    for frames, hidden in zip(theirs, before_norm(run, clips, "none"), strict=True):
        expected = tower.layer_norm(nn.functional.avg_pool1d(hidden.T, 2).T)
        assert_frames_close(frames[: len(expected)], expected)
    lengths = [len(clip) // 320 // 2 for clip in clips]
    ids = torch.tensor([[1] + [AUDIO_TOKEN] * lengths[0] + [3]])
    first = {name: value[:1] for name, value in inputs.items()}
    written = model.generate(input_ids=ids, **first, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > ids.shape[1]


def tiny_voxtral() -> VoxtralForConditionalGeneration:
    audio = VoxtralEncoderConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_mel_bins=80,
    )
    text = {**TEXT, "model_type": "llama"}
    config = VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_TOKEN)
    return VoxtralForConditionalGeneration(config).eval()


def tiny_qwen2_5_omni() -> Qwen2_5OmniThinkerForConditionalGeneration:
    audio = {**SIZES, "d_model": 32, "encoder_ffn_dim": 128, "output_dim": 32}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = Qwen2_5OmniThinkerConfig(
        audio_config=audio, vision_config={**vision, "out_hidden_size": 32}, text_config=text
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


@torch.no_grad()
def test_in_voxtral(run: Path, clips: list[np.ndarray], tmp_path: Path):
    out = export_run(run, tmp_path / "tower", "voxtral")
    model = swap_tower(tiny_voxtral(), out)
    mel = features(run, clips[:1])["input_features"]
    theirs = model.model.audio_tower(mel).last_hidden_state[0]
    (ours,) = load_encoder(run, padding="30s").encode(clips[:1], 16_000)
    assert_frames_close(theirs[: len(ours)], ours)
    ids = torch.tensor([[1] + [AUDIO_TOKEN] * 375 + [3]])
    assert (
        model.generate(input_ids=ids, input_features=mel, max_new_tokens=3, do_sample=False).shape[
            1
        ]
        > 377
    )


@torch.no_grad()
def test_in_the_tower_of_qwen2_5_omni(run: Path, clips: list[np.ndarray], tmp_path: Path):
    """It attends within two seconds; the reference is Whisper's layers on the clip's frames."""
    out = export_run(run, tmp_path / "tower", "qwen2.5-omni")
    sizes = {**SIZES, "d_model": 32, "encoder_ffn_dim": 128, "output_dim": 32}
    holder = nn.Module()
    holder.audio_tower = Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**sizes)).eval()
    bias = holder.audio_tower.proj.bias.clone()
    swap_tower(holder, out)
    assert torch.equal(holder.audio_tower.proj.bias, bias)  # not in the export, so unchanged
    holder.audio_tower.proj = nn.Identity()
    whisper = WhisperModel.from_pretrained(run / "export" / "encoder").encoder
    mel = features(run, clips)["input_features"][1][:, :125]
    hidden = nn.functional.gelu(
        whisper.conv2(nn.functional.gelu(whisper.conv1(mel[None])))
    ).transpose(1, 2)
    hidden = hidden + whisper.embed_positions.weight[: hidden.shape[1]]
    for layer in whisper.layers:
        hidden = layer(hidden, None)
    expected = whisper.layer_norm(
        nn.functional.avg_pool1d(hidden.transpose(1, 2), 2).transpose(1, 2)
    )
    theirs = holder.audio_tower(mel, feature_lens=torch.tensor([125])).last_hidden_state
    assert_frames_close(theirs, expected[0])


def test_positions_are_compared_before_they_are_rounded(run: Path, tmp_path: Path):
    out = export_run(run, tmp_path / "tower", "qwen2.5-omni", "bf16")
    assert {w.dtype for w in load_file(out / "tower.safetensors").values()} == {torch.bfloat16}


def test_a_tower_that_does_not_fit_is_rejected(run: Path, tmp_path: Path):
    out = export_run(run, tmp_path / "tower", "qwen2-audio", "bf16")
    with pytest.raises(UserError, match=r"does not fit Qwen2AudioEncoder: .* of another shape"):
        swap_tower(tiny_qwen2_audio(d_model=64), out)
    with pytest.raises(UserError, match="are unexpected"):
        swap_tower(tiny_qwen2_audio(encoder_layers=1), out)
    with pytest.raises(UserError, match="has 0 audio towers"):
        swap_tower(nn.Linear(1, 1), out)
    with pytest.raises(UserError, match="does not contain an audio tower"):
        swap_tower(tiny_qwen2_audio(), tmp_path)


def test_a_tower_must_compute_the_same_function(run: Path):
    whisper = WhisperModel.from_pretrained(run / "export" / "encoder").encoder
    weights, config = dict(whisper.state_dict()), whisper.config
    for name in TOWERS:
        check_tower(name, weights, config)
    moved = weights | {"embed_positions.weight": weights["embed_positions.weight"] + 0.1}
    with pytest.raises(UserError, match="not Whisper's sinusoids"):
        check_tower("qwen2.5-omni", moved, config)
    config.encoder_ffn_dim = 64
    with pytest.raises(UserError, match="feed-forward is 64 wide"):
        check_tower("voxtral", weights, config)
    config.scale_embedding = True
    with pytest.raises(UserError, match="scale_embedding"):
        check_tower("qwen2-audio", weights, config)


TOWERS = {
    "qwen2-audio": ("Qwen/Qwen2-Audio-7B", tiny_qwen2_audio),
    "qwen2.5-omni": ("Qwen/Qwen2.5-Omni-3B", tiny_qwen2_5_omni),
    "audio-flamingo-3": ("nvidia/audio-flamingo-3-hf", tiny_audio_flamingo_3),
    "voxtral": ("mistralai/Voxtral-Mini-3B-2507", tiny_voxtral),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "onnx"])  # in test_onnx.py
def test_each_snippet_of_a_card_runs_as_it_is_written(
    kind: ExportKind, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("clip.wav").write_bytes(encode_audio(tone(1.0), kind="WAV"))
    if kind in TOWERS:  # a small model where the published one would be downloaded from
        repository, make = TOWERS[kind]
        make().save_pretrained(repository)
    card = (export_run(run, Path("exported"), kind) / "README.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    found = {}
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), found)
        if "frames" in found:
            assert found["frames"].shape[-2:] == (50, 32)
    assert len(snippets) == (2 if kind == "encoder" else 1)
    if kind in TOWERS:
        assert "swap_tower" in found


def test_a_card_that_is_pushed_names_its_repository(run: Path, tmp_path: Path):
    out = export_run(run, tmp_path / "out", "encoder", name="org/name", licence="cc-by-4.0")
    card = ModelCard((out / "README.md").read_text())
    assert 'load_encoder("org/name")' in card.text
    assert card.data.license == "cc-by-4.0"
