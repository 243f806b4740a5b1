"""Whisper's own decoder computes what Hugging Face computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from tests.support.decoders import TEXTS, targets_of
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.targets import DomainPrompt
from whisper_aut.errors import UserError
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.decoders.whisper import WhisperDecoderOptions, build_whisper_decoder
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.models.pretrained import PretrainedWhisper


@pytest.mark.parametrize("lengths_seconds", [(1.0, 5.0, 3.0)])
def test_whisper_loss_and_gradients_equal_hugging_face(
    tiny_whisper: Path, lengths_seconds: tuple[float, ...]
):
    start = PretrainedWhisper(str(tiny_whisper))
    entry, options = check_decoder({"name": "whisper"})
    decoder, codec = entry.build(start, options, False)
    encoder = PackedEncoder(start.encoder, "30s")
    generator = torch.Generator().manual_seed(0)
    waveforms = [
        torch.randn(round(16_000 * seconds), generator=generator) * 0.1
        for seconds in lengths_seconds
    ]
    targets = targets_of(codec)
    logmel = LogMel(80)
    frames = encoder(
        torch.cat([logmel(w) for w in waveforms]), [mel_frames(len(w)) for w in waveforms]
    )
    loss = decoder.loss(frames.values, frames.lengths, targets)
    (loss.total / sum(loss.counts)).backward()
    ours = {
        name: p.grad.clone() for name, p in start.model.named_parameters() if p.grad is not None
    }

    reference = WhisperForConditionalGeneration.from_pretrained(tiny_whisper)
    arrays = [w.numpy() for w in waveforms]
    features = WhisperFeatureExtractor(80)(
        arrays, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    # The recipe's labels: what the tokenizer gives without the start token, padded with -100.
    labels = [torch.tensor(start.tokenizer(text).input_ids[1:]) for text in TEXTS]
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    expected = reference(input_features=features, labels=labels).loss
    expected.backward()
    assert_close(loss.total.detach() / sum(loss.counts), expected.detach(), rtol=1e-5, atol=0)
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    theirs.pop(
        "model.encoder.embed_positions.weight"
    )  # fixed in Whisper and here; transformers trains it by oversight
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-5 * max(float(grad.norm()), 1e-3), name


def test_whisper_greedy_text_equals_hugging_face(tiny_whisper: Path):
    start = PretrainedWhisper(str(tiny_whisper))
    entry, options = check_decoder({"name": "whisper"})
    decoder, codec = entry.build(start, options, False)
    start.model.eval()
    encoder = PackedEncoder(start.encoder, "30s")
    waveform = torch.randn(32_000, generator=torch.Generator().manual_seed(3)) * 0.1
    frames = encoder(LogMel(80)(waveform), [mel_frames(len(waveform))])
    prompt = targets_of(codec, ("x",)).prompts()
    written = decoder.generate(frames.values, frames.lengths, prompt, max_new_tokens=12)[0]
    features = WhisperFeatureExtractor(80)(
        waveform.numpy(), sampling_rate=16_000, return_tensors="pt"
    ).input_features
    expected = start.model.generate(
        features, language="en", task="transcribe", max_new_tokens=12, do_sample=False, num_beams=1
    )[0]
    expected = [
        int(token)
        for token in expected
        if int(token) not in (*prompt[0].tolist(), decoder.end_token)
    ]
    assert [token for token in written if token not in prompt[0].tolist()] == expected


def test_a_batch_of_clips_gives_the_texts_of_single_clips(tiny_whisper: Path):
    """Clips of several lengths, prompts with and without a language, suppressed tokens."""
    start = PretrainedWhisper(str(tiny_whisper))
    whisper = start.model.eval().model.decoder
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # so that texts differ from clip to clip
        for layer in whisper.layers:
            for linear in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                linear.weight.normal_(generator=generator)
    entry, options = check_decoder({"name": "whisper"})
    decoder, codec = entry.build(start, options, False)
    lengths = (50, 31, 50, 12)
    frames = torch.randn(sum(lengths), start.config.d_model, generator=generator)
    (prompt,) = targets_of(codec, ("x",)).prompts()
    prompts = [prompt, prompt, prompt[[0, 2, 3]], prompt]

    @torch.no_grad()
    def naive(clip: torch.Tensor, prompt: torch.Tensor) -> list[int]:
        tokens = prompt.tolist()
        while len(tokens) < len(prompt) + 10:
            states = whisper(torch.tensor([tokens]), encoder_hidden_states=clip[None])
            scores = states.last_hidden_state[0, -1] @ whisper.embed_tokens.weight.T
            scores[never if len(tokens) > len(prompt) else never + not_first] = -torch.inf
            tokens.append(int(scores.argmax()))
            if tokens[-1] == decoder.end_token:
                return tokens[len(prompt) : -1]
        return tokens[len(prompt) :]

    never, not_first, texts = [], [], []
    for _ in range(2):
        texts.append(decoder.generate(frames, lengths, prompts, max_new_tokens=10))
        assert texts[-1] == [
            naive(clip, prompt)
            for clip, prompt in zip(frames.split(list(lengths)), prompts, strict=True)
        ]
        # Once more, without the tokens that these texts begin with, and without their last ones.
        never, not_first = ([text[index] for text in texts[0]] for index in (-1, 0))
        decoder.suppressed, decoder.suppressed_first = never, never + not_first
    assert texts[0] != texts[1]
    assert len({tuple(text) for text in texts[0]}) > 1


def test_a_tokenizer_of_another_model_is_an_error(tiny_whisper: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_whisper, tmp_path / "copy"))
    options = WhisperDecoderOptions(max_tokens=32)
    build_whisper_decoder(PretrainedWhisper(str(copy)), options, gradient_checkpointing=False)
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copy / file).unlink(missing_ok=True)
    with pytest.raises(
        UserError, match=r"The tokenizer of .* does not belong to the checkpoint: it "
    ):
        build_whisper_decoder(PretrainedWhisper(str(copy)), options, gradient_checkpointing=False)
    model, tokenizer = Tokenizer(BPE()), copy / "tokenizer.json"
    model.add_tokens(["a", "b"])
    model.save(str(tokenizer))
    with pytest.raises(
        UserError, match=r"The tokenizer of .* does not belong to the checkpoint: it "
    ):
        build_whisper_decoder(PretrainedWhisper(str(copy)), options, gradient_checkpointing=False)


def test_a_missing_decoder_is_the_first_error(tiny_whisper: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_whisper, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"decoder_layers": 0, "max_target_positions": 1})
    )
    with pytest.raises(UserError, match="is an encoder without a decoder"):
        build_whisper_decoder(
            PretrainedWhisper(str(copy)), WhisperDecoderOptions(), gradient_checkpointing=False
        )


ENGLISH_ONLY_TOKENS = 51_864  # of `openai/whisper-*.en`


@pytest.fixture
def without_generation_config(tiny_whisper: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(tiny_whisper, tmp_path / "copy"))
    (copy / "generation_config.json").unlink()
    return copy


def test_an_english_only_checkpoint_is_known_without_a_generation_config(
    without_generation_config: Path,
):
    """Its tokenizer holds language and task tokens too, which it was never trained with."""
    model = WhisperForConditionalGeneration.from_pretrained(without_generation_config)
    model.resize_token_embeddings(ENGLISH_ONLY_TOKENS)
    model.save_pretrained(without_generation_config)
    (without_generation_config / "generation_config.json").unlink()
    start = PretrainedWhisper(str(without_generation_config))
    _, codec = build_whisper_decoder(start, WhisperDecoderOptions(), False)
    target = codec.encode(Annotation(text="x", language="deu"), "speech", 0)
    assert start.tokenizer.convert_ids_to_tokens(target.tokens[:2].tolist()) == [
        "<|startoftranscript|>",
        "<|notimestamps|>",
    ]
    assert target.prompt_length == 2
    assert not start.multilingual
    assert start.generation_config.is_multilingual is False  # and so an export says


def test_a_multilingual_checkpoint_is_known_without_a_generation_config(
    without_generation_config: Path, tiny_whisper: Path
):
    made, given = (
        PretrainedWhisper(str(path)).generation_config
        for path in (without_generation_config, tiny_whisper)
    )
    for name in ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id"):
        assert getattr(made, name) == getattr(given, name), name


def test_a_language_of_the_config_that_the_checkpoint_has_no_token_for_is_an_error(
    tiny_whisper: Path,
):
    for language, message in (
        ("klingon", "is not a language of Whisper"),
        ("spoken", "is not a language of Whisper"),
    ):
        options = WhisperDecoderOptions(prompts={"speech": DomainPrompt(language=language)})
        with pytest.raises(UserError, match=rf"decoder\.prompts\.speech\.language.*{message}"):
            build_whisper_decoder(PretrainedWhisper(str(tiny_whisper)), options, False)
    options = WhisperDecoderOptions(prompts={"speech": DomainPrompt(language="deu")})
    _, codec = build_whisper_decoder(PretrainedWhisper(str(tiny_whisper)), options, False)
    assert codec.language_token("deu") == "<|de|>"


def test_a_tokenizer_of_another_whisper_generation_is_an_error(tiny_whisper: Path, tmp_path: Path):
    """One language more: every token after the languages has another number than in the weights."""
    copy = Path(shutil.copytree(tiny_whisper, tmp_path / "copy"))
    config = json.loads((copy / "generation_config.json").read_text())
    config["no_timestamps_token_id"] -= 1
    (copy / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="numbers its tokens differently"):
        build_whisper_decoder(PretrainedWhisper(str(copy)), WhisperDecoderOptions(), False)
