"""The contract that every registered decoder keeps, and what is special to Whisper's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.data.logmel import LogMel, mel_frames
from whisper_aut.data.pack import Targets
from whisper_aut.data.text import TextCodec
from whisper_aut.errors import UserError
from whisper_aut.model.decoders import DECODERS, check_decoder
from whisper_aut.model.decoders.protocol import Decoder
from whisper_aut.model.encoder import PackedEncoder
from whisper_aut.model.start import Start

TEXTS = ("a dog barks twice", "rain falls", "a slow tune on a piano")


@pytest.fixture(params=sorted(DECODERS))
def kit(request: pytest.FixtureRequest, tiny_whisper: Path) -> tuple[Any, TextCodec]:
    torch.manual_seed(0)
    entry, options = check_decoder({"name": request.param})
    return entry.build(Start(str(tiny_whisper)), options, False)


def frames_and_lengths(width: int = 32) -> tuple[Tensor, tuple[int, ...]]:
    lengths = (7, 25, 12)
    return torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(0)), lengths


def targets_of(codec: TextCodec, texts: tuple[str, ...] = TEXTS) -> Targets:
    return Targets.pack([codec.encode(Annotation(text=text), "sound") for text in texts])


def test_keeps_the_protocols(kit: tuple[Any, TextCodec]):
    assert isinstance(kit[0], Decoder)
    assert isinstance(kit[1], TextCodec)


def test_loss_counts_supervised_tokens_and_reaches_the_frames(kit: tuple[Any, TextCodec]):
    decoder, codec = kit
    frames, lengths = frames_and_lengths()
    frames.requires_grad_(True)
    targets = targets_of(codec)
    loss = decoder.loss(frames, lengths, targets)
    assert sum(loss.counts) == int(targets.supervised.sum()) == len(loss.token_nll) == len(loss.correct)
    assert_close(loss.total.detach(), loss.token_nll.sum())
    loss.total.backward()
    assert all(clip.abs().sum() > 0 for clip in frames.grad.split(lengths))
    assert all(p.grad is not None for p in decoder.trainable_parameters())


def test_a_clip_in_a_batch_is_the_clip_alone(kit: tuple[Any, TextCodec]):
    decoder, codec = kit
    frames, lengths = frames_and_lengths()
    together = decoder.loss(frames, lengths, targets_of(codec))
    alone = [
        decoder.loss(clip, (len(clip),), targets_of(codec, (text,))).total
        for clip, text in zip(frames.split(lengths), TEXTS, strict=True)
    ]
    assert_close(torch.stack([part.sum() for part in together.token_nll.split(together.counts)]), torch.stack(alone).detach())


def test_generates_token_lists_within_the_limit(kit: tuple[Any, TextCodec]):
    decoder, codec = kit
    frames, lengths = frames_and_lengths()
    written = decoder.generate(frames, lengths, targets_of(codec).prompts(), max_new_tokens=5)
    assert len(written) == len(lengths)
    assert all(len(tokens) <= 5 for tokens in written)
    assert all(isinstance(codec.decode(tokens), str) for tokens in written)


def test_a_decoder_overfits_one_batch_and_then_writes_it(kit: tuple[Any, TextCodec]):
    decoder, codec = kit
    frames, lengths = frames_and_lengths()
    targets = targets_of(codec)
    optimizer = torch.optim.AdamW(decoder.trainable_parameters(), lr=3e-3)
    for _ in range(120):
        loss = decoder.loss(frames, lengths, targets)
        (loss.total / sum(loss.counts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    decoder.eval()
    written = decoder.generate(frames, lengths, targets.prompts(), max_new_tokens=24)
    assert [codec.decode(tokens) for tokens in written] == list(TEXTS)


def test_unknown_decoders_and_options_are_refused_with_a_hint():
    with pytest.raises(UserError, match="Did you mean 'whisper'"):
        check_decoder({"name": "wisper"})
    with pytest.raises(UserError, match=r"max_tokenz.*Did you mean 'max_tokens'"):
        check_decoder({"name": "whisper", "max_tokenz": 3})


@pytest.mark.parametrize("lengths_seconds", [(1.0, 5.0, 3.0)])
def test_whisper_loss_and_gradients_equal_hugging_face(tiny_whisper: Path, lengths_seconds: tuple[float, ...]):
    start = Start(str(tiny_whisper))
    entry, options = check_decoder({"name": "whisper"})
    decoder, codec = entry.build(start, options, False)
    encoder = PackedEncoder(start.encoder, "30s")
    generator = torch.Generator().manual_seed(0)
    waveforms = [torch.randn(round(16_000 * seconds), generator=generator) * 0.1 for seconds in lengths_seconds]
    targets = targets_of(codec)
    logmel = LogMel(80)
    frames = encoder(torch.cat([logmel(w) for w in waveforms]), [mel_frames(len(w)) for w in waveforms])
    loss = decoder.loss(frames.values, frames.lengths, targets)
    (loss.total / sum(loss.counts)).backward()
    ours = {name: p.grad.clone() for name, p in start.model.named_parameters() if p.grad is not None}

    reference = WhisperForConditionalGeneration.from_pretrained(tiny_whisper)
    arrays = [w.numpy() for w in waveforms]
    features = WhisperFeatureExtractor(80)(arrays, sampling_rate=16_000, return_tensors="pt").input_features
    # The recipe's labels: what the tokenizer gives without the start token, padded with -100.
    labels = [torch.tensor(start.tokenizer(text).input_ids[1:]) for text in TEXTS]
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    expected = reference(input_features=features, labels=labels).loss
    expected.backward()
    assert_close(loss.total.detach() / sum(loss.counts), expected.detach(), rtol=1e-5, atol=0)
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    theirs.pop("model.encoder.embed_positions.weight")  # fixed in Whisper and here; transformers trains it by oversight
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-5 * max(float(grad.norm()), 1e-3), name


def test_whisper_greedy_text_equals_hugging_face(tiny_whisper: Path):
    start = Start(str(tiny_whisper))
    entry, options = check_decoder({"name": "whisper"})
    decoder, codec = entry.build(start, options, False)
    start.model.eval()
    encoder = PackedEncoder(start.encoder, "30s")
    waveform = torch.randn(32_000, generator=torch.Generator().manual_seed(3)) * 0.1
    frames = encoder(LogMel(80)(waveform), [mel_frames(len(waveform))])
    prompt = targets_of(codec, ("x",)).prompts()
    written = decoder.generate(frames.values, frames.lengths, prompt, max_new_tokens=12)[0]
    features = WhisperFeatureExtractor(80)(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    expected = start.model.generate(
        features, language="en", task="transcribe", max_new_tokens=12, do_sample=False, num_beams=1
    )[0]
    expected = [int(token) for token in expected if int(token) not in (*prompt[0].tolist(), decoder.end_token)]
    assert [token for token in written if token not in prompt[0].tolist()] == expected
