"""A step through a frozen language model: answers only, packed, against all positions of a padded
batch.

Both sides have Qwen3-0.6B's width, heads and vocabulary in four of its 28 layers, the same weights,
adapter, frames and chats: 4 clips of 8 s with 60 text tokens, 20 of them the answer. The other side
is what a causal language model of Hugging Face computes when it is given `labels`: logits and
cross-entropy of every position. The mixture has clips of 2 to 14 s, which it pads to the longest.
`answers only` compares with the same padded batch whose output layer runs at the supervised
positions alone, which a careful user would write.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from memory import apart, peak_rise_megabytes
from pairs import Row, compare, compare_values, main
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from transformers import Qwen3Config, Qwen3ForCausalLM

from whisper_aut.data.batch import Targets, TokenTarget
from whisper_aut.data.targets import AUDIO
from whisper_aut.models.adapters import AdapterOptions, build_adapter, embedding_scale
from whisper_aut.models.decoders.causal_lm import CausalLMDecoder
from whisper_aut.models.losses import chunked_cross_entropy

LAYERS, WIDTH, VOCABULARY, ENCODER_WIDTH = 4, 1024, 151_936, 384
TEXT, ANSWER, AUDIO_INDEX, IGNORED = 60, 20, 3, -100
AGAINST = "padded batch through Qwen3ForCausalLM with labels"


class Step:
    """The same frames, chats and weights, run by each side; `ours` and `theirs` return the summed
    loss and the frames' gradient.
    """

    def __init__(self, frames: Sequence[int]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3072,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
        self.model: Any = Qwen3ForCausalLM(config).requires_grad_(False).eval()
        scale = embedding_scale(self.model.get_input_embeddings())
        adapter = build_adapter(AdapterOptions(), ENCODER_WIDTH, WIDTH, scale)
        self.decoder = CausalLMDecoder(self.model, adapter, AUDIO_INDEX, end_token=0, identity={})
        self.lengths = tuple(frames)
        self.frames = torch.randn(sum(frames), ENCODER_WIDTH, requires_grad=True)
        self.targets = Targets.pack([_chat() for _ in frames])

    def ours(self) -> tuple[Tensor, Tensor]:
        return self._through(self.decoder.loss(self.frames, self.lengths, self.targets).total)

    def theirs(self, answers_only: bool = False) -> tuple[Tensor, Tensor]:
        self.model.config._attn_implementation = "sdpa"
        embed, sequences, labels = self.model.get_input_embeddings(), [], []
        for clip, tokens in zip(
            self.frames.split(self.lengths),
            self.targets.tokens.split(self.targets.lengths),
            strict=True,
        ):
            audio, _ = self.decoder.adapter(clip, (len(clip),))
            sequences.append(
                torch.cat([embed(tokens[:AUDIO_INDEX]), audio, embed(tokens[AUDIO_INDEX + 1 :])])
            )
            masked = torch.full((len(sequences[-1]),), IGNORED)
            masked[-ANSWER:] = tokens[-ANSWER:]
            labels.append(masked)
        batch = pad_sequence(sequences, batch_first=True)
        mask = pad_sequence([torch.ones(len(sequence)) for sequence in sequences], batch_first=True)
        padded = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        given = {"inputs_embeds": batch, "attention_mask": mask, "use_cache": False}
        if answers_only:
            hidden = self.model.model(**given).last_hidden_state[:, :-1]
            supervised = padded[:, 1:] != IGNORED
            logits = self.model.lm_head(hidden[supervised])
            return self._through(cross_entropy(logits, padded[:, 1:][supervised], reduction="sum"))
        mean = self.model(**given, labels=padded).loss
        return self._through(mean * sum(self.targets.counts))

    def _through(self, total: Tensor) -> tuple[Tensor, Tensor]:
        self.frames.grad = None
        self.decoder.adapter.zero_grad()
        total.backward()
        assert self.frames.grad is not None
        return total.detach(), self.frames.grad


def cases(runs: int) -> Iterator[Row]:
    for case, frames in (("4 x 8 s", [400] * 4), ("2-14 s", [100, 180, 260, 700])):
        step = Step(frames)
        timing = {"check": _same, "runs": runs, "steps": True}
        yield compare(f"step time, {case}", step.ours, step.theirs, against=AGAINST, **timing)
        yield compare(
            f"step time, {case}, answers only",
            step.ours,
            partial(step.theirs, answers_only=True),
            against="padded batch through Qwen3Model, logits at the answers only",
            **timing,
        )
    against = "logits and cross-entropy of all positions"
    measured = (lambda: apart(loss_megabytes, True), lambda: apart(loss_megabytes, False))
    yield compare_values("loss memory", *measured, unit="MB", against=against, runs=runs)


def loss_megabytes(ours: bool) -> float:
    """Peak memory of output layer, loss and backward to the last hidden states, 4 chats of 100
    audio and 60 text positions.
    """
    torch.manual_seed(0)
    hidden = torch.randn(4, 100 + TEXT - 1, WIDTH, requires_grad=True)
    embedding = torch.randn(VOCABULARY, WIDTH)
    labels = torch.full(hidden.shape[:2], IGNORED)
    labels[:, -ANSWER:] = torch.randint(VOCABULARY, (4, ANSWER))

    def answers_only() -> None:
        places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        chunked_cross_entropy(hidden[:, :-1][places], embedding, labels[:, 1:][places])[
            0
        ].backward()

    def all_positions() -> None:
        logits = hidden @ embedding.T
        model_loss = torch.nn.functional.cross_entropy
        model_loss(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        ).backward()

    return peak_rise_megabytes(answers_only if ours else all_positions)


def _chat() -> TokenTarget:
    tokens = torch.randint(1, VOCABULARY, (TEXT + 1,))
    tokens[AUDIO_INDEX] = AUDIO
    supervised = torch.zeros(TEXT + 1, dtype=torch.bool)
    supervised[-ANSWER:] = True
    return TokenTarget(tokens, supervised, TEXT + 1 - ANSWER, "", "")


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert_close(one[0], other[0], rtol=1e-5, atol=0)
    assert (one[1] - other[1]).norm() <= 1e-5 * other[1].norm()


if __name__ == "__main__":
    main(cases, "One UniWhisper step from encoder frames on, Qwen3-0.6B with 4 of its 28 layers")
