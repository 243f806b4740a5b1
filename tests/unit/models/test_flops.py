"""The FLOP formulas against PyTorch's own counter on a real step."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig, WhisperForConditionalGeneration

from whisper_aut.audio.logmel import frames_with_context
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.batch import Targets, TokenTarget
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.decoders.whisper import WhisperDecoder
from whisper_aut.models.encoder import PackedEncoder, add_lora
from whisper_aut.models.flops import encoder_flops, whisper_decoder_flops
from whisper_aut.models.pretrained import PretrainedWhisper

MEL_LENGTHS, TEXT_LENGTHS = (300, 501, 77), (12, 30, 7)


@pytest.fixture(autouse=True)
def counted_products(monkeypatch: pytest.MonkeyPatch):
    """Keep to products that PyTorch's counter knows; oneDNN's are none of them."""
    monkeypatch.setattr("whisper_aut.onednn.mkl_is_slow", lambda: False)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("width", [32, 64])
def test_formulas_count_what_pytorch_counts(width: int, recomputed: bool):
    tokens = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1
    )
    sizes = {
        "d_model": width,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_ffn_dim": 3 * width,
        "decoder_ffn_dim": 5 * width,
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(**sizes, **heads, **tokens, vocab_size=700, num_mel_bins=80)
    model = WhisperForConditionalGeneration(config)
    encoder = PackedEncoder(model.model.encoder, gradient_checkpointing=recomputed)
    decoder = WhisperDecoder(model.model.decoder, 1, gradient_checkpointing=recomputed)
    ones = [torch.ones(length, dtype=torch.long) for length in TEXT_LENGTHS]
    targets = Targets.pack([TokenTarget(clip, torch.arange(len(clip)) > 0, 1) for clip in ones])
    mel = torch.randn(sum(map(frames_with_context, MEL_LENGTHS)), 80)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        frames = encoder(mel, MEL_LENGTHS)
        decoder.loss(frames.values, frames.lengths, targets).total.backward()
    supervised = sum(TEXT_LENGTHS) - len(TEXT_LENGTHS)
    ours = encoder_flops(config, MEL_LENGTHS, frames.lengths, recomputed=recomputed)
    ours += decoder.flops(frames.lengths, targets, recomputed=recomputed)
    # The convolutions also run over the zeros between clips, which are no useful work.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.005)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        values = encoder(mel, MEL_LENGTHS).values
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as second:
        decoder.loss(values, frames.lengths, targets).total.backward()
    options = {"recomputed": recomputed, "through_frames": False}
    ours = decoder.flops(frames.lengths, targets, **options)
    assert ours == pytest.approx(second.get_total_flops(), rel=0.005)
    held = encoder_flops(config, MEL_LENGTHS, frames.lengths, trained=False)
    assert held == pytest.approx(counter.get_total_flops(), rel=0.01)
    add_lora(encoder, 1, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(mel, MEL_LENGTHS).values.sum().backward()
    options = {"recomputed": recomputed, "frozen_weights": True}
    ours = encoder_flops(config, MEL_LENGTHS, frames.lengths, **options)
    # The updates have products of their own; the first layer's input needs no gradient.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert decoder.flops(frames.lengths, targets) == whisper_decoder_flops(
        config, frames.lengths, TEXT_LENGTHS, supervised
    )


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter", ["stack", "linear"])
@pytest.mark.parametrize("train", ["frozen", "lora", "full"])
def test_the_language_models_formula_counts_what_pytorch_counts(
    train: str, adapter: str, recomputed: bool, tiny_whisper: Path, tiny_language_model: Path
):
    options = {
        "language_model": str(tiny_language_model),
        "instructions": {"caption": {"prompts": ["Describe it."]}},
        "train": train,
        "adapter": {"name": adapter, "frames": 20},
    }
    entry, checked = check_decoder({"name": "causal_lm", **options})
    decoder, codec = entry.build(PretrainedWhisper(str(tiny_whisper)), checked, recomputed)
    targets = Targets.pack(
        [
            codec.encode(Annotation(text=text), "sound", 0)
            for text in ("rain falls", "a dog barks twice")
        ]
    )
    lengths = (150, 251)
    for through in (True, False):
        frames = torch.randn(sum(lengths), 32, requires_grad=through)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            decoder.loss(frames, lengths, targets).total.backward()
        ours = decoder.flops(lengths, targets, recomputed=recomputed, through_frames=through)
        assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
