"""A causal language model as decoder, as in UniWhisper (arXiv 2602.21772).

An adapter maps encoder frames to embeddings, which replace the audio token of a chat; the loss is
next-token prediction on the answer. By default the language model stays frozen. Chats are packed
like clips: attention stays within each chat, positions restart, and logits exist for supervised
positions only. Language models that cannot run packed get padded batches
(`models.language_model`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, WhisperConfig

from whisper_aut.data.batch import Targets
from whisper_aut.data.targets import ChatText, Instruction, Instructions
from whisper_aut.errors import UserError, require
from whisper_aut.models.adapters import (
    AdapterOptions,
    LayerFusion,
    StackAdapter,
    build_adapter,
    embedding_scale,
)
from whisper_aut.models.attention import draws_random_numbers, upload
from whisper_aut.models.flops import TRAINED_PRODUCTS, language_model_flops
from whisper_aut.models.language_model import (
    SequenceLayout,
    compile_layers,
    find_layout,
    greedy_tokens,
    layout_without_weights,
    load_language_config,
    load_language_model,
    recompute_layers,
    sequence_states,
    weights_hash,
)
from whisper_aut.models.losses import DecoderLoss, token_loss
from whisper_aut.models.pretrained import PretrainedWhisper, seeded
from whisper_aut.models.tiny import LanguageScratch, make_language_model, scratch_config
from whisper_aut.schema import Text

META_AUDIO_INDEX = 3  # for planning: ChatML writes three tokens before the user's text


@dataclass
class LoraOptions:
    """Low-rank updates of the language model's linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


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
    language_model: Text = "Qwen/Qwen3-0.6B"
    revision: Text = ""
    scratch: LanguageScratch | None = None
    train: Literal["frozen", "lora", "full"] = "frozen"
    random_init: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraOptions = field(default_factory=LoraOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    instructions: dict[str, Instruction] = field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=8)] = 512
    overflow: Literal["cut", "drop"] = "cut"
    date: Text = ""

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype in which the language model is loaded."""
        return torch.float32 if self.train == "full" else getattr(torch, self.dtype)


def build_causal_lm(
    pretrained: PretrainedWhisper, options: CausalLMOptions, gradient_checkpointing: bool
) -> "tuple[CausalLMDecoder, ChatText]":
    """Load the language model, and build the decoder and its codec. See `DecoderEntry.build`.

    Raises:
        UserError: the language model cannot be used, or an option is invalid.
    """
    instructions = Instructions(options.instructions)
    last, layers = pretrained.config.encoder_layers, options.adapter.layers
    if layers and (max(layers) != last or len(set(layers)) < len(layers)):
        raise UserError(
            f"decoder.adapter.layers: give different layers from 0 to {last}, with {last}, the "
            "output, among them. Otherwise the top of the encoder would not be trained."
        )
    path = options.language_model
    if options.scratch:
        path = make_language_model(options.scratch, instructions)
    empty = pretrained.empty
    model, tokenizer = load_language_model(
        path, options.revision, options.weights_dtype, empty=empty
    )
    layout = SequenceLayout() if empty else find_layout(path, model)
    if options.random_init and not empty:
        # Checkpoints do not contain frozen weights, so they must be the same every time.
        with seeded(0):
            model = type(model)(model.config).to(options.weights_dtype)  # pyright: ignore[reportArgumentType]
    codec = ChatText(tokenizer, instructions, options.max_tokens, options.overflow, options.date)
    embed: Any = model.get_input_embeddings()
    adapter = build_adapter(
        options.adapter,
        pretrained.config.d_model,
        embed.embedding_dim,
        1.0 if empty else embedding_scale(embed),
    )
    identity = {
        "language_model": path,
        "revision": options.revision,
        "weights": "" if empty else weights_hash(model),
    }
    _choose_trainable(model, options)
    decoder = CausalLMDecoder(
        model,
        adapter,
        audio_index=len(codec.frame.opening),
        end_token=codec.frame.end,
        identity=identity,
        layout=layout,
        frozen=options.train == "frozen",
        gradient_checkpointing=gradient_checkpointing,
        encoder_layers=options.adapter.layers,
    )
    return decoder, codec


def build_causal_lm_meta(
    config: WhisperConfig, options: CausalLMOptions, gradient_checkpointing: bool
) -> nn.Module:
    """Build the decoder without pretrained weights or a tokenizer. See `DecoderEntry.build_meta`.

    Raises:
        UserError: the model does not run on fake tensors.
    """
    if options.scratch:
        language_config: Any = scratch_config(options.scratch, options.scratch.vocabulary)
    else:
        language_config = load_language_config(options.language_model, options.revision)
    model = AutoModelForCausalLM.from_config(
        language_config, dtype=options.weights_dtype, trust_remote_code=False
    )
    _choose_trainable(model, options)
    width = language_config.hidden_size
    return CausalLMDecoder(
        model,
        build_adapter(options.adapter, config.d_model, width, scale=1.0),
        audio_index=META_AUDIO_INDEX,
        end_token=0,
        identity={},
        layout=layout_without_weights(model, width),
        frozen=options.train == "frozen",
        gradient_checkpointing=gradient_checkpointing,
        encoder_layers=options.adapter.layers,
    )


class CausalLMDecoder(nn.Module):
    """Runs a causal language model on chats that contain audio.

    Frozen weights of the language model are left out of the state dict. A checkpoint stores their
    hash instead, and loading fails if the hash differs.

    Args:
        model: a Hugging Face causal language model, with `requires_grad` already set.
        adapter: maps encoder frames to embeddings of the language model.
        audio_index: index of the audio token in every chat.
        end_token: the token that ends an answer.
        identity: name, revision and weight hash of the language model, stored in checkpoints.
        layout: how the language model runs on a batch.
        frozen: keep the language model in eval mode, whatever the mode of the rest.
        gradient_checkpointing: recompute each layer in the backward pass instead of storing its
            activations.
        encoder_layers: encoder layers that the adapter fuses. Empty for the encoder's output.
    """

    from_first_rank = ("layout", "identity")  # they depend on weights that it alone has read

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: StackAdapter,
        audio_index: int,
        end_token: int,
        identity: dict[str, str],
        layout: SequenceLayout = SequenceLayout(),  # noqa: B008 — immutable
        *,
        frozen: bool = True,
        gradient_checkpointing: bool = False,
        encoder_layers: Sequence[int] = (),
    ):
        super().__init__()
        self.model, self.adapter = model, adapter
        self.audio_index, self.end_token, self.identity = audio_index, end_token, identity
        self.layout, self.frozen = layout, frozen
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            recompute_layers(model)
        self.encoder_layers = tuple(encoder_layers)
        self.fusion = LayerFusion(len(encoder_layers)) if encoder_layers else nn.Identity()
        model.generation_config = GenerationConfig()  # the model's own may enable sampling
        model.register_state_dict_post_hook(_remove_frozen)
        model.register_load_state_dict_pre_hook(_restore_frozen)
        self.train()

    def train(self, mode: bool = True) -> "CausalLMDecoder":
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def compile_layers(self) -> None:
        """Run layers through `torch.compile`; see `attention.compile_layer`."""
        if self.frozen or not draws_random_numbers(self.model):
            compile_layers(self.model)

    def loss(self, frames: Tensor, lengths: Sequence[int], targets: Targets) -> DecoderLoss:
        embeddings, chat_lengths = self._embed_chats(
            frames, lengths, targets.tokens, targets.lengths
        )
        states = sequence_states(self.model, embeddings, chat_lengths, self.layout)
        # In `embeddings`, the audio of its own clip and of all earlier clips shifts a label token.
        added = [chat - text for chat, text in zip(chat_lengths, targets.lengths, strict=True)]
        shifts = torch.cat(
            [
                torch.full((count,), shift)
                for shift, count in zip(accumulate(added), targets.counts, strict=True)
            ]
        )
        positions = targets.label_indices + upload(shifts, frames.device)
        weight: Any = self.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
        # Each token is predicted from the state one position before it.
        return token_loss(states.index_select(0, positions - 1), weight, targets)

    @torch.no_grad()
    def generate(
        self,
        frames: Tensor,
        lengths: Sequence[int],
        prompts: Sequence[Tensor],
        max_new_tokens: int = 64,
    ) -> list[list[int]]:
        tokens = torch.cat(list(prompts)).to(frames.device)
        embeddings, chat_lengths = self._embed_chats(
            frames, lengths, tokens, [len(prompt) for prompt in prompts]
        )
        return greedy_tokens(
            self.model,
            embeddings,
            chat_lengths,
            self.layout,
            end=self.end_token,
            max_new_tokens=max_new_tokens,
        )

    def flops(
        self, lengths: Sequence[int], targets: Targets, through_frames: bool = True, **options: bool
    ) -> float:
        """Return the FLOPs of a training step, see `Decoder` and `language_model_flops`."""
        audio = [-(-length // self.adapter.hop) for length in lengths]
        chats = [text - 1 + clip for text, clip in zip(targets.lengths, audio, strict=True)]
        weights = sum(weight.numel() for weight in self.adapter.parameters() if weight.ndim > 1)
        if not (through_frames or [*self.fusion.parameters(), *self.adapter.norm_in.parameters()]):
            weights -= next(self.adapter.layers.parameters()).numel() / TRAINED_PRODUCTS
        adapted = TRAINED_PRODUCTS * 2 * weights * sum(audio)
        return adapted + language_model_flops(self.model, chats, sum(targets.counts), **options)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def get_extra_state(self) -> dict[str, str]:
        return dict(self.identity)

    def set_extra_state(self, state: dict[str, str]) -> None:
        if state["weights"] != self.identity["weights"]:
            raise UserError(
                f"The checkpoint was trained through {state['language_model']} with weights "
                f"{state['weights']}, but {self.identity['language_model']} has weights "
                f"{self.identity['weights']}."
            )

    def _embed_chats(
        self,
        frames: Tensor,
        frame_lengths: Sequence[int],
        tokens: Tensor,
        token_lengths: Sequence[int],
    ) -> tuple[Tensor, list[int]]:
        """Embed packed chats `[ΣL]` and replace each `AUDIO` token with its clip's embeddings.

        Returns:
            The embeddings `[ΣL', W]`, and L' per chat.
        """
        audio, audio_lengths = self.adapter(self.fusion(frames), frame_lengths)
        text = self.model.get_input_embeddings()(tokens.clamp(min=0))
        audio = audio.to(text.dtype)
        start, parts = self.audio_index, []
        for chat, clip in zip(
            text.split(list(token_lengths)), audio.split(list(audio_lengths)), strict=True
        ):
            parts += [chat[:start], clip, chat[start + 1 :]]
        lengths = [text - 1 + clip for text, clip in zip(token_lengths, audio_lengths, strict=True)]
        return torch.cat(parts), lengths


def _choose_trainable(model: PreTrainedModel, options: CausalLMOptions) -> None:
    model.requires_grad_(options.train == "full")
    if options.train == "lora":
        require("peft")
        from peft import LoraConfig, inject_adapter_in_model

        updates = LoraConfig(
            r=options.lora.rank,
            lora_alpha=options.lora.alpha,
            lora_dropout=options.lora.dropout,
            target_modules="all-linear",
        )
        inject_adapter_in_model(updates, model)


def _frozen_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not trained. Tied parameters appear under all their names."""
    return {
        name: value
        for name, value in model.named_parameters(remove_duplicate=False)
        if not value.requires_grad
    }


def _remove_frozen(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen_parameters(model):
        state.pop(prefix + name, None)


def _restore_frozen(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in _frozen_parameters(model).items():
        state.setdefault(prefix + name, parameter.detach())
