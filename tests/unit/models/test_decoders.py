"""The contract that every registered decoder keeps. One from outside the package, written below,
keeps it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedTokenizerBase

from tests.support.decoders import TEXTS, frames_and_lengths, targets_of
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.batch import Targets, TokenTarget
from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import UserError
from whisper_aut.models.decoders import DECODERS, DecoderEntry, check_decoder
from whisper_aut.models.decoders.base import Decoder
from whisper_aut.models.losses import DecoderLoss
from whisper_aut.models.module import ONE_LETTER
from whisper_aut.models.pretrained import PretrainedWhisper

BLANK = 0


@dataclass
class CTCOptions:
    name: str = "ctc"


@dataclass
class CTCText:
    """Token ids shifted by one: zero is the blank."""

    tokenizer: PreTrainedTokenizerBase
    metrics = {"transcription": "words"}  # noqa: RUF012

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        tokens = (
            torch.tensor(self.tokenizer(annotation.text, add_special_tokens=False).input_ids) + 1
        )
        return TokenTarget(
            tokens, torch.ones(len(tokens), dtype=torch.bool), 0, annotation.text, "transcription"
        )

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode([token - 1 for token in tokens])).strip()


class CTCDecoder(nn.Module):
    """Two layers and connectionist temporal classification: nothing of the two decoders in the
    package.
    """

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, vocabulary + 1))

    def loss(self, frames: Tensor, lengths: Sequence[int], targets: Targets) -> DecoderLoss:
        losses = [
            nn.functional.ctc_loss(
                clip.log_softmax(-1), text, [len(clip)], [len(text)], BLANK, "sum"
            )
            for clip, text in zip(
                self.head(frames).split(lengths), targets.tokens.split(targets.lengths), strict=True
            )
        ]
        nll = torch.cat(
            [(one.detach() / n).expand(n) for one, n in zip(losses, targets.lengths, strict=True)]
        )
        return DecoderLoss(
            torch.stack(losses).sum(), nll, torch.zeros(len(nll), dtype=torch.bool), targets.lengths
        )

    def generate(
        self,
        frames: Tensor,
        lengths: Sequence[int],
        prompts: Sequence[Tensor],
        max_new_tokens: int = 64,
    ) -> list[list[int]]:
        best = [clip.argmax(-1).unique_consecutive() for clip in self.head(frames).split(lengths)]
        return [tokens[tokens != BLANK].tolist()[:max_new_tokens] for tokens in best]

    def trainable_parameters(self) -> Any:
        return self.parameters()


def build_ctc(
    start: PretrainedWhisper, options: CTCOptions, gradient_checkpointing: bool
) -> tuple[nn.Module, TextCodec]:
    return CTCDecoder(start.config.d_model, len(start.tokenizer)), CTCText(start.tokenizer)


@pytest.fixture(params=[*sorted(DECODERS), "ctc", "causal_lm trained"])
def kit(
    request: pytest.FixtureRequest,
    tiny_whisper: Path,
    tiny_language_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Any, TextCodec]:
    monkeypatch.setitem(DECODERS, "ctc", DecoderEntry(CTCOptions, build_ctc))
    name, _, trained = request.param.partition(" ")
    caption = {"caption": {"prompts": ["Describe it.", "What is it?"]}}
    language = {
        "language_model": str(tiny_language_model),
        "instructions": caption,
        "train": "full" if trained else "frozen",
    }
    torch.manual_seed(0)
    entry, options = check_decoder({"name": name, **(language if name == "causal_lm" else {})})
    return entry.build(PretrainedWhisper(str(tiny_whisper)), options, False)


def test_keeps_the_protocols(kit: tuple[Any, TextCodec]):
    assert isinstance(kit[0], Decoder)
    assert isinstance(kit[1], TextCodec)


def test_encodes_the_text_that_a_rank_without_clips_runs_on(kit: tuple[Any, TextCodec]):
    assert kit[1].encode(ONE_LETTER, "speech", 0).supervised.any()


def test_loss_counts_supervised_tokens_and_reaches_the_frames(kit: tuple[Any, TextCodec]):
    decoder, codec = kit
    frames, lengths = frames_and_lengths()
    frames.requires_grad_(True)
    targets = targets_of(codec)
    loss = decoder.loss(frames, lengths, targets)
    assert (
        sum(loss.counts)
        == int(targets.supervised.sum())
        == len(loss.token_nll)
        == len(loss.correct)
    )
    assert_close(loss.total.detach(), loss.token_nll.sum())
    loss.total.backward()
    assert all(clip.abs().sum() > 0 for clip in frames.grad.split(lengths))
    assert all(p.grad is not None for p in decoder.trainable_parameters())


def test_weighted_clips_weigh_so_much_in_the_loss(kit: tuple[Any, TextCodec]):
    decoder, codec = kit
    if isinstance(decoder, CTCDecoder):
        pytest.skip("it takes no weights, which the module reports")
    targets = targets_of(codec)
    targets.weights = (0.5, 1.0, 0.25)
    loss = decoder.loss(*frames_and_lengths(), targets)
    clips = zip(targets.weights, loss.token_nll.split(loss.counts), strict=True)
    assert_close(
        loss.total.detach(), torch.stack([weight * nll.sum() for weight, nll in clips]).sum()
    )


def test_a_clip_in_a_batch_is_the_clip_alone(kit: tuple[Any, TextCodec]):
    decoder, codec = kit
    frames, lengths = frames_and_lengths()
    together = decoder.loss(frames, lengths, targets_of(codec))
    alone = [
        decoder.loss(clip, (len(clip),), targets_of(codec, (text,))).total
        for clip, text in zip(frames.split(lengths), TEXTS, strict=True)
    ]
    assert_close(
        torch.stack([part.sum() for part in together.token_nll.split(together.counts)]),
        torch.stack(alone).detach(),
    )


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
    for _ in range(250):
        loss = decoder.loss(frames, lengths, targets)
        mean = loss.total / sum(loss.counts)
        if mean < 0.05:
            break
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    decoder.eval()
    written = decoder.generate(frames, lengths, targets.prompts(), max_new_tokens=24)
    assert [codec.decode(tokens) for tokens in written] == list(TEXTS)


def test_unknown_decoders_and_options_are_errors_with_a_hint():
    with pytest.raises(UserError, match="Did you mean 'whisper'"):
        check_decoder({"name": "wisper"})
    with pytest.raises(UserError, match=r"max_tokenz.*Did you mean 'max_tokens'"):
        check_decoder({"name": "whisper", "max_tokenz": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "whisper", "max_tokens": 0}, "max_tokens: must be greater than or equal to 8"),
        ({"name": "causal_lm", "max_tokens": 7}, "max_tokens: must be greater than or equal to 8"),
        (
            {"name": "causal_lm", "adapter": {"name": "stak"}},
            "adapter.name: there is no adapter 'stak'. Did you mean 'stack'?",
        ),
        ({"name": "causal_lm", "adapter": {"frames": 0}}, "adapter.frames: must be greater than 0"),
        ({"name": "causal_lm", "lora": {"rank": 0}}, "lora.rank: must be greater than 0"),
    ],
)
def test_options_out_of_range_are_found_without_building_a_decoder(
    options: dict[str, Any], message: str
):
    with pytest.raises(UserError) as error:
        check_decoder(options)
    assert message in str(error.value)
