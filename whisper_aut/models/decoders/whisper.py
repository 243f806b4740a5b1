"""Whisper's own decoder on packed clips, trained together with the encoder as in Whisper-AuT.

Source: arXiv 2604.10438. Modules, weights and arithmetic are those of Hugging Face's
`WhisperForConditionalGeneration`. Texts are packed like clips: self- and cross-attention stay
within each clip, and logits exist for supervised positions only. Of the export formats, only
`whisper` contains the decoder.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import EncoderDecoderCache, WhisperConfig
from transformers.cache_utils import DynamicCache
from transformers.models.whisper.modeling_whisper import WhisperDecoder as HFWhisperDecoder

from whisper_aut.data.annotation import whisper_codes
from whisper_aut.data.batch import Targets
from whisper_aut.data.targets import SAMPLE_LANGUAGE, DomainPrompt, WhisperText
from whisper_aut.errors import UserError
from whisper_aut.models.attention import (
    Segments,
    cast_for_products,
    compile_layer,
    draws_random_numbers,
    upload,
)
from whisper_aut.models.encoder import packed_attention, packed_feed_forward
from whisper_aut.models.flops import whisper_decoder_flops
from whisper_aut.models.losses import DecoderLoss, token_loss
from whisper_aut.models.pretrained import PretrainedWhisper


@dataclass
class WhisperDecoderOptions:
    """The `decoder` group of a config with `name: whisper`. See `data.targets.WhisperText`."""

    name: str = "whisper"
    prompts: dict[str, DomainPrompt] = field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=8)] = 448
    overflow: Literal["cut", "drop"] = "cut"
    supervise_prompt: bool | list[str] = True


def build_whisper_decoder(
    pretrained: PretrainedWhisper, options: WhisperDecoderOptions, gradient_checkpointing: bool
) -> "tuple[WhisperDecoder, WhisperText]":
    """Build the decoder and the codec from a pretrained checkpoint. See `DecoderEntry.build`.

    Raises:
        UserError: the checkpoint has no decoder or a wrong tokenizer, or an option does not fit it.
    """
    model = pretrained.model  # first, because it raises if the checkpoint has no decoder
    _check_tokenizer(pretrained, options.prompts.values())
    longest = pretrained.config.max_target_positions
    if options.max_tokens > longest:
        raise UserError(
            f"decoder.max_tokens: {options.max_tokens} is above {longest}, the number of positions "
            f"of {pretrained.path}."
        )
    codec = WhisperText(
        pretrained.tokenizer,
        options.prompts,
        options.max_tokens,
        options.overflow,
        options.supervise_prompt,
        pretrained.multilingual,
    )
    for domain, prompt in options.prompts.items():
        if (length := len(codec.prompt_tokens(domain, ""))) + 2 > options.max_tokens:
            raise UserError(
                f"decoder.prompts.{domain}.text: {length} tokens leave no room for an answer. "
                "Shorten it, or raise decoder.max_tokens."
            )
        if prompt.language == SAMPLE_LANGUAGE or codec.language_token(prompt.language):
            continue
        if not whisper_codes(prompt.language):
            problem = (
                f"{prompt.language!r} is not a language of Whisper. Give a code such as `en`, or "
                f"`{SAMPLE_LANGUAGE}` for the language that each sample states."
            )
        else:
            problem = f"the tokenizer of {pretrained.path} has no token for {prompt.language!r}."
        raise UserError(f"decoder.prompts.{domain}.language: {problem}")
    decoder = WhisperDecoder(
        model.model.decoder,
        pretrained.token_id("<|endoftext|>"),
        gradient_checkpointing,
        suppressed=pretrained.generation_config.suppress_tokens or (),
        suppressed_first=pretrained.generation_config.begin_suppress_tokens or (),
    )
    return decoder, codec


def _check_tokenizer(pretrained: PretrainedWhisper, prompts: Iterable[DomainPrompt]) -> None:
    """Raise `UserError` if the tokenizer does not belong to the checkpoint.

    If tokenizer files are missing, transformers silently builds a tokenizer of its own.
    """
    config, tokenizer = pretrained.config, pretrained.tokenizer
    special = ["<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"]
    special += ["<|transcribe|>", "<|translate|>"] if pretrained.multilingual else []
    special += [token for prompt in prompts for token in prompt.special_tokens]
    ids = [pretrained.token_id(token) for token in special]
    # Whisper generations differ in their number of languages, which shifts `<|notimestamps|>`.
    no_timestamps = getattr(pretrained.generation_config, "no_timestamps_token_id", None)
    expected = [config.decoder_start_token_id, config.eos_token_id, no_timestamps or ids[2]]
    missing = [token for token in special if token not in tokenizer.get_vocab()]
    text_ids = tokenizer("a", add_special_tokens=False).input_ids
    if missing:
        problem = f"has no {', '.join(missing)}"
    elif not text_ids:
        problem = "gives no tokens for a text"
    elif max(*text_ids, *ids) >= config.vocab_size or ids[:3] != expected:
        problem = "numbers its tokens differently"
    else:
        return
    raise UserError(
        f"The tokenizer of {pretrained.path} does not belong to the checkpoint: it {problem}. Copy "
        "tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json from the source "
        "of the weights."
    )


def build_whisper_decoder_meta(
    config: WhisperConfig, options: WhisperDecoderOptions, gradient_checkpointing: bool
) -> nn.Module:
    """Build the decoder from its configuration. See `DecoderEntry.build_meta`."""
    return WhisperDecoder(HFWhisperDecoder(config), 0, gradient_checkpointing)


class WhisperDecoder(nn.Module):
    """Runs a Hugging Face `WhisperDecoder` on packed clips. Output and token embeddings are tied.

    Args:
        whisper: the decoder to run. Its modules and parameters are used directly, without a copy.
        end_token: id of `<|endoftext|>`, at which generation stops.
        gradient_checkpointing: recompute each layer in the backward pass instead of storing its
            activations.
        suppressed: tokens that are never generated, as in the checkpoint's generation config.
        suppressed_first: more tokens that no text begins with.
    """

    def __init__(
        self,
        whisper: HFWhisperDecoder,
        end_token: int,
        gradient_checkpointing: bool = False,
        *,
        suppressed: Sequence[int] = (),
        suppressed_first: Sequence[int] = (),
    ):
        super().__init__()
        self.whisper = whisper
        self.end_token = end_token
        self.gradient_checkpointing = gradient_checkpointing
        self._has_dropout = draws_random_numbers(whisper)
        self._layer: Any = _decoder_layer
        self.suppressed = list(suppressed)
        self.suppressed_first = [*suppressed, *suppressed_first]

    def compile_layers(self) -> None:
        """Run layers through `torch.compile`; see `attention.compile_layer`."""
        if not self._has_dropout:
            self._layer = compile_layer(_decoder_layer)

    def loss(self, frames: Tensor, lengths: Sequence[int], targets: Targets) -> DecoderLoss:
        hidden = self._hidden(frames, lengths, targets)
        # Each token is predicted from the state one position before it.
        before = hidden[targets.label_indices - 1]
        return token_loss(before, self.whisper.embed_tokens.weight, targets)

    @torch.no_grad()
    def generate(
        self,
        frames: Tensor,
        lengths: Sequence[int],
        prompts: Sequence[Tensor],
        max_new_tokens: int = 64,
    ) -> list[list[int]]:
        clips = frames.split(list(lengths))
        answers: list[list[int]] = [[] for _ in clips]
        # A prompt without a language token is shorter.
        for length in {len(prompt) for prompt in prompts}:
            chosen = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            written = self._greedy(
                [clips[index] for index in chosen],
                torch.stack([prompts[index] for index in chosen]),
                min(max_new_tokens, self.whisper.max_target_positions - length),
            )
            for index, answer in zip(chosen, written, strict=True):
                answers[index] = answer
        return answers

    def flops(self, lengths: Sequence[int], targets: Targets, **options: bool) -> float:
        """Return the FLOPs of a training step, see `Decoder` and `whisper_decoder_flops`."""
        config, supervised = self.whisper.config, sum(targets.counts)
        return whisper_decoder_flops(config, lengths, targets.lengths, supervised, **options)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def _hidden(self, frames: Tensor, lengths: Sequence[int], targets: Targets) -> Tensor:
        """Return the last hidden states of all text tokens, `[ΣL, D]`."""
        whisper = self.whisper
        positions = torch.cat([torch.arange(length) for length in targets.lengths])
        positions = upload(positions, frames.device)
        hidden = whisper.embed_tokens(targets.tokens)
        hidden = hidden + whisper.embed_positions(None, position_ids=positions)
        hidden = dropout(hidden, p=whisper.dropout, training=self.training)
        own, across = (
            Segments.of(targets.lengths, keys, frames.device)
            for keys in (targets.lengths, tuple(lengths))
        )
        frames = cast_for_products(frames)  # once for all layers
        for layer in whisper.layers:
            run: Any = getattr(layer, "packed", None) or partial(self.run_layer, layer)
            hidden = run(hidden, frames, own, across)
        return whisper.layer_norm(hidden)

    def run_layer(
        self, layer: Any, hidden: Tensor, frames: Tensor, own: Segments, across: Segments
    ) -> Tensor:
        """Run one layer on packed texts, `[ΣL, D]`. FSDP wraps this as the layer's `packed`."""
        arguments = (layer, hidden, frames, own, across)
        if self.gradient_checkpointing and self.training:
            return checkpoint(  # pyright: ignore[reportReturnType]
                *(self._layer, *arguments),
                use_reentrant=False,
                preserve_rng_state=self._has_dropout,
            )
        return self._layer(*arguments)

    def _greedy(
        self, clips: Sequence[Tensor], prompts: Tensor, max_new_tokens: int
    ) -> list[list[int]]:
        """Continue the prompts `[B, P]` of clips `[T, D]`, in one batch padded to the longest."""
        whisper = self.whisper
        frames = pad_sequence(list(clips), batch_first=True)
        lengths = torch.tensor([len(clip) for clip in clips], device=frames.device)
        padding = torch.arange(frames.shape[1], device=frames.device) >= lengths[:, None]
        mask = frames.new_zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = prompts.to(frames.device)
        ended = torch.zeros(len(clips), dtype=torch.bool, device=frames.device)
        written: list[Tensor] = []
        while len(written) < max_new_tokens and not ended.all():
            start = cache.get_seq_length()
            positions = torch.arange(start, start + tokens.shape[1], device=frames.device)
            hidden = whisper.embed_tokens(tokens)
            hidden = hidden + whisper.embed_positions(None, position_ids=positions)
            for layer in whisper.layers:
                hidden = layer(
                    hidden,
                    encoder_hidden_states=frames,
                    encoder_attention_mask=mask,  # Hugging Face's decoder passes none
                    past_key_values=cache,
                )
            scores = whisper.layer_norm(hidden[:, -1]) @ whisper.embed_tokens.weight.T
            scores[:, self.suppressed if written else self.suppressed_first] = -torch.inf
            best = scores.argmax(-1)
            ended |= best == self.end_token
            written.append(best)
            tokens = best[:, None]
        answers = torch.stack(written, dim=1).tolist() if written else [[] for _ in clips]
        return [list(takewhile(lambda token: token != self.end_token, row)) for row in answers]


def _decoder_layer(
    layer: Any, hidden: Tensor, frames: Tensor, own: Segments, across: Segments
) -> Tensor:
    """Run one layer on packed texts `[ΣL, D]`, in the order of `WhisperDecoderLayer.forward`."""
    normed = layer.self_attn_layer_norm(hidden)
    attended = packed_attention(layer.self_attn, normed, normed, own, causal=True)
    hidden = hidden + dropout(attended, p=layer.dropout, training=layer.training)
    normed = layer.encoder_attn_layer_norm(hidden)
    attended = packed_attention(layer.encoder_attn, normed, frames, across)
    hidden = hidden + dropout(attended, p=layer.dropout, training=layer.training)
    return hidden + packed_feed_forward(layer, layer.final_layer_norm(hidden))
