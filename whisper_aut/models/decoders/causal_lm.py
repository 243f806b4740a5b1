"""A causal language model as decoder, as in UniWhisper (arXiv 2602.21772).

An adapter maps encoder frames to embeddings, which replace the audio token of a chat; the loss is
next-token prediction on the answer. By default the language model stays frozen. Chats are packed
like clips: attention stays within each chat, positions restart, and logits exist for supervised
positions only. Language models that cannot run packed get padded batches (`models.language`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, WhisperConfig

from whisper_aut.data.batch import Targets
from whisper_aut.data.targets import ChatText, Instruction, Instructions
from whisper_aut.errors import UserError
from whisper_aut.models.adapters import AdapterOptions, StackAdapter, build_adapter, embedding_scale
from whisper_aut.models.flops import PRODUCT, language_model_flops
from whisper_aut.models.language import (
    SequenceLayout,
    check_layout,
    greedy_tokens,
    language_config,
    layout_for_meta,
    load_language_model,
    recompute_layers,
    sequence_states,
    weights_hash,
)
from whisper_aut.models.losses import DecoderLoss, chunked_cross_entropy
from whisper_aut.models.pretrained import PretrainedWhisper, seeded
from whisper_aut.models.tiny import LanguageScratch, make_language_model, scratch_config

META_AUDIO_INDEX = 3  # index of the audio token: ChatML writes three tokens before the user's text
Training = Literal["frozen", "lora", "full"]


@dataclass
class LoraOptions:
    """Low-rank updates of the language model's linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 16
    alpha: int = 32


@dataclass
class CausalLMOptions:
    """The `decoder` group of a config with `name: causal_lm`.

    Attributes:
        language_model: hub id or directory. Ignored if `scratch` is set.
        revision: branch, tag or commit on the hub. Empty for the default branch.
        scratch: train a small language model on the texts of shards first, and use it instead.
        train: which weights of the language model are trained: none (`frozen`), low-rank updates
            (`lora`), or all (`full`).
        random_init: replace the weights with random ones; keep the architecture and the tokenizer.
        dtype: dtype of the frozen weights. `bfloat16` halves their memory. Trained weights are
            float32: the low-rank updates, or the whole model with `full`.
        lora: rank and scale of the low-rank updates, used with `train: lora`.
        adapter: the adapter between encoder and language model.
        instructions: the tasks and their prompts. Defaults to the files of `conf/instructions`.
        max_tokens: the longest chat, in text tokens.
        overflow: what happens to a longer chat: `cut` keeps its beginning without an end token,
            `drop` skips the sample.
        date: the current date that a chat template writes, such as 2026-11-28. Defaults to the day
            on which the run started.
    """

    name: str = "causal_lm"
    language_model: str = "Qwen/Qwen3-0.6B"
    revision: str = ""
    scratch: LanguageScratch | None = None
    train: Training = "frozen"
    random_init: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraOptions = field(default_factory=LoraOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    instructions: dict[str, Instruction] = field(default_factory=dict)
    max_tokens: int = 512
    overflow: Literal["cut", "drop"] = "cut"
    date: str = ""


def build_causal_lm(
    start: PretrainedWhisper, options: CausalLMOptions, gradient_checkpointing: bool
) -> "tuple[CausalLMDecoder, ChatText]":
    """Load the language model and build the adapter and the codec.

    Args:
        start: the Whisper checkpoint whose encoder is trained; only its width is used.
        options: the `decoder` group of the config.
        gradient_checkpointing: recompute the layers of the language model in the backward pass.

    Returns:
        The decoder and its codec.

    Raises:
        UserError: the language model cannot be used, or an option is invalid.
    """
    if options.max_tokens < 8:
        raise UserError(
            f"decoder.max_tokens: {options.max_tokens} is below 8, the least that a chat takes."
        )
    instructions = Instructions(options.instructions)
    path = (
        make_language_model(options.scratch, instructions)
        if options.scratch
        else options.language_model
    )
    dtype = _frozen_dtype(options)
    model, tokenizer = load_language_model(path, options.revision, dtype)
    layout = check_layout(path, model)
    if options.random_init:
        # Checkpoints do not contain frozen weights, so they must be the same every time.
        with seeded(0):
            model = type(model)(model.config).to(dtype)  # pyright: ignore[reportArgumentType]
    codec = ChatText(tokenizer, instructions, options.max_tokens, options.overflow, options.date)
    embed: Any = model.get_input_embeddings()
    adapter = build_adapter(
        options.adapter, start.config.d_model, embed.embedding_dim, embedding_scale(embed)
    )
    identity = {
        "language_model": path,
        "revision": options.revision,
        "weights": weights_hash(model),
    }
    _choose_trainable(model, options)
    if gradient_checkpointing:
        recompute_layers(model)
    decoder = CausalLMDecoder(
        model,
        adapter,
        len(codec.frame.opening),
        codec.frame.end,
        identity,
        layout,
        held=options.train == "frozen",
    )
    return decoder, codec


def build_causal_lm_meta(
    config: WhisperConfig, options: CausalLMOptions, gradient_checkpointing: bool
) -> nn.Module:
    """Build the decoder from its configuration, without pretrained weights or a tokenizer.

    See `DecoderEntry.build_meta`.

    Raises:
        UserError: LoRA is requested, whose weights peft cannot create as fake tensors, or the model
            does not run on fake tensors.
    """
    if options.train == "lora":
        raise UserError(
            "LoRA cannot be planned: peft needs real weights. Plan with decoder.train=frozen and "
            "leave room for its updates."
        )
    scratch = options.scratch
    sizes = (
        scratch_config(scratch, scratch.vocabulary)
        if scratch
        else language_config(options.language_model, options.revision)
    )
    model = AutoModelForCausalLM.from_config(
        sizes, dtype=_frozen_dtype(options), trust_remote_code=False
    )
    _choose_trainable(model, options)
    if gradient_checkpointing:
        recompute_layers(model)
    adapter = build_adapter(options.adapter, config.d_model, sizes.hidden_size, scale=1.0)
    return CausalLMDecoder(
        model,
        adapter,
        META_AUDIO_INDEX,
        end_token=0,
        identity={},
        layout=layout_for_meta(model, sizes.hidden_size),
        held=options.train == "frozen",
    )


class CausalLMDecoder(nn.Module):
    """Runs a causal language model on chats that contain audio.

    Frozen weights of the language model are left out of the state dict. A checkpoint stores their
    hash instead, and loading fails if the hash differs.

    Args:
        model: a Hugging Face causal language model, with `requires_grad` already set.
        adapter: maps encoder frames to embeddings of the language model.
        audio_at: index of the audio token in every chat.
        end_token: the token that ends an answer.
        identity: name, revision and weight hash of the language model, stored in checkpoints.
        layout: how the language model runs on a batch.
        held: keep the language model in eval mode, whatever the mode of the rest.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: StackAdapter,
        audio_at: int,
        end_token: int,
        identity: dict[str, str],
        layout: SequenceLayout = SequenceLayout(),  # noqa: B008 — immutable
        *,
        held: bool = True,
    ):
        super().__init__()
        self.model, self.adapter = model, adapter
        self.audio_at, self.end_token, self.identity = audio_at, end_token, identity
        self.layout, self.held = layout, held
        model.generation_config = GenerationConfig()  # the model's own may enable sampling
        model.register_state_dict_post_hook(_leave_out_frozen)
        model.register_load_state_dict_pre_hook(_keep_frozen)
        self.train()

    def train(self, mode: bool = True) -> "CausalLMDecoder":
        super().train(mode)
        if self.held:
            self.model.eval()
        return self

    def loss(self, frames: Tensor, lengths: Sequence[int], targets: Targets) -> DecoderLoss:
        chats = self._lay_out(frames, lengths, targets.tokens, targets.lengths)
        states = sequence_states(self.model, chats.embeddings, chats.lengths, self.layout)
        predicted = targets.label_indices
        # Each token is predicted from the state one position before it.
        hidden = states.index_select(0, chats.places.index_select(0, predicted) - 1)
        weight: Any = self.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
        total, nll, correct = chunked_cross_entropy(hidden, weight, targets.tokens[predicted])
        return DecoderLoss(total, nll, correct, targets.counts)

    @torch.no_grad()
    def generate(
        self,
        frames: Tensor,
        lengths: Sequence[int],
        prompts: Sequence[Tensor],
        max_new_tokens: int = 64,
    ) -> list[list[int]]:
        tokens = torch.cat(list(prompts)).to(frames.device)
        chats = self._lay_out(frames, lengths, tokens, [len(prompt) for prompt in prompts])
        return greedy_tokens(
            self.model,
            chats.embeddings,
            chats.lengths,
            self.layout,
            end=self.end_token,
            max_new_tokens=max_new_tokens,
        )

    def flops(self, lengths: Sequence[int], targets: Targets) -> float:
        """Return the FLOPs of a training step on clips of T frames, for the throughput metrics."""
        audio = [-(-length // self.adapter.hop) for length in lengths]
        chats = [text - 1 + sounding for text, sounding in zip(targets.lengths, audio, strict=True)]
        of_model = language_model_flops(self.model, chats, sum(targets.counts))
        weights = sum(
            parameter.numel() for parameter in self.adapter.parameters() if parameter.ndim > 1
        )
        return of_model + PRODUCT * 2 * weights * sum(audio)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def get_extra_state(self) -> dict[str, str]:
        return dict(self.identity)

    def set_extra_state(self, state: dict[str, str]) -> None:
        if state["weights"] != self.identity["weights"]:
            raise UserError(
                f"The checkpoint was trained through {state['language_model']} with weights "
                f"{state['weights']}; {self.identity['language_model']} holds others "
                f"({self.identity['weights']})."
            )

    def _lay_out(
        self,
        frames: Tensor,
        frame_lengths: Sequence[int],
        tokens: Tensor,
        token_lengths: Sequence[int],
    ) -> "_Chats":
        """Embed packed chats `[ΣL]` and replace each `AUDIO` token with its clip's embeddings."""
        audio, audio_lengths = self.adapter(frames, frame_lengths)
        text = self.model.get_input_embeddings()(tokens.clamp(min=0))
        order, places, lengths = _interleave(token_lengths, self.audio_at, audio_lengths)
        source = torch.cat([text, audio.to(text.dtype)])
        order, places = (index.to(source.device, non_blocking=True) for index in (order, places))
        return _Chats(source.index_select(0, order), places, lengths)


@dataclass(frozen=True)
class _Chats:
    """Packed chats with their audio.

    Attributes:
        embeddings: `[ΣL', W]`.
        places: index into `embeddings` of each text token, `[ΣL]`.
        lengths: L' per chat, audio included.
    """

    embeddings: Tensor
    places: Tensor
    lengths: tuple[int, ...]


def _interleave(
    token_lengths: Sequence[int], audio_at: int, audio_lengths: Sequence[int]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return the layout of chats whose `AUDIO` token is replaced with the clip's audio.

    Returns:
        For each position of the result `[ΣL']` its index into the concatenation `[text; audio]`;
        for each text token `[ΣL]` its position in the result; and L' per chat.
    """
    order, places, lengths = [], [], []
    token, audio, position = 0, sum(token_lengths), 0
    for length, sounding in zip(token_lengths, audio_lengths, strict=True):
        at, end = token + audio_at, token + length
        order += [
            torch.arange(token, at),
            torch.arange(audio, audio + sounding),
            torch.arange(at + 1, end),
        ]
        lengths.append(length - 1 + sounding)
        after = position + audio_at + sounding
        places += [
            torch.arange(position, position + audio_at + 1),
            torch.arange(after, position + lengths[-1]),
        ]
        token, audio, position = end, audio + sounding, position + lengths[-1]
    return torch.cat(order), torch.cat(places), tuple(lengths)


def _frozen_dtype(options: CausalLMOptions) -> torch.dtype:
    """Return the dtype to load the language model in: float32 if all of it is trained."""
    return torch.float32 if options.train == "full" else getattr(torch, options.dtype)


def _choose_trainable(model: PreTrainedModel, options: CausalLMOptions) -> None:
    model.requires_grad_(options.train == "full")
    if options.train == "lora":
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UserError(
                "decoder.train=lora needs peft: pip install 'whisper-aut[lora]'"
            ) from None
        updates = LoraConfig(
            r=options.lora.rank, lora_alpha=options.lora.alpha, target_modules="all-linear"
        )
        inject_adapter_in_model(updates, model)


def _leave_out_frozen(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen(model):
        state.pop(prefix + name, None)


def _keep_frozen(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in _frozen(model).items():
        state.setdefault(prefix + name, parameter.detach())


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not trained. Tied parameters appear under all their names."""
    return {
        name: value
        for name, value in model.named_parameters(remove_duplicate=False)
        if not value.requires_grad
    }
