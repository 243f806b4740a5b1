"""A causal language model as the teacher of the encoder: adapter → chat → next-token loss on the answer.

In: encoder frames `[ΣT, D]` and chats with a place for the audio (`data.chat`). Out: loss and text. Source: UniWhisper (arXiv 2602.21772):
the language model stays frozen, so the encoder has to bring sound to where language already is. Chats lie end to end like the clips
do: attention stays inside each, positions restart at each, and logits exist for supervised positions only. A language model that cannot
run so is given padded batches (`model.language`).
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
from whisper_aut.models.attention import sent
from whisper_aut.models.dense import speed_up_products
from whisper_aut.models.flops import PRODUCT, language_model_flops
from whisper_aut.models.language import (
    SequenceLayout,
    check_layout,
    greedy_tokens,
    language_config,
    load_language_model,
    recompute_layers,
    sequence_states,
    sketched_layout,
    weights_hash,
)
from whisper_aut.models.losses import DecoderLoss, chunked_cross_entropy
from whisper_aut.models.pretrained import Start
from whisper_aut.models.seeding import seeded
from whisper_aut.models.tiny import LanguageScratch, make_language_model, scratch_config

SKETCHED_AUDIO_AT = 3  # behind what ChatML writes before the first turn's text
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
        language_model: hub id or directory; unused with `scratch`.
        revision: branch, tag or commit on the hub; empty for the default.
        scratch: instead, a small language model made and trained on the texts of shards first.
        train: what of the language model training may change: nothing (`frozen`), low-rank updates (`lora`), all of it (`full`).
        random_init: keep its architecture and tokenizer but not its weights.
        dtype: of the language model's frozen weights; `bfloat16` halves their memory. What is trained
            is float32: low-rank updates, or with `full` the whole model.
        instructions: the tasks (`data.prompts`), by default the files of `conf/instructions`.
        max_tokens: longest chat in text tokens; `overflow` says what happens to a longer one.
        date: the day that a chat template writes as today, such as 2026-11-28; by default the day on which the run started.
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
    start: Start, options: CausalLMOptions, gradient_checkpointing: bool
) -> "tuple[CausalLMDecoder, ChatText]":
    """Load the language model, put an adapter before it, and make a codec around its tokenizer.

    Raises:
        UserError: the language model cannot be used, or an option does not fit.
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
        # A checkpoint does not hold a frozen model, so it must come out the same again.
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


def sketch_causal_lm(
    config: WhisperConfig, options: CausalLMOptions, gradient_checkpointing: bool
) -> nn.Module:
    """Return the decoder that `build_causal_lm` would, with sizes alone; see `DecoderEntry.sketch`.

    Raises:
        UserError: with LoRA, whose weights peft cannot make without memory, or a model that does not run without its own.
    """
    if options.train == "lora":
        raise UserError(
            "LoRA cannot be planned: peft needs real weights. Plan with decoder.train=frozen and leave room for its updates."
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
        SKETCHED_AUDIO_AT,
        end_token=0,
        identity={},
        layout=sketched_layout(model, sizes.hidden_size),
        held=options.train == "frozen",
    )


class CausalLMDecoder(nn.Module):
    """Runs a language model on chats.

    Weights of the language model that are not trained are not in its state dict: a checkpoint names them, and refuses others.

    Args:
        model: a Hugging Face causal language model, its trainable parameters chosen.
        adapter: encoder frames → its embeddings.
        audio_at: the index at which every chat has its audio.
        end_token: the token that ends an answer.
        identity: what a checkpoint records of the language model as it was loaded.
        layout: how it runs on a batch.
        held: keep it in eval mode whatever mode the rest is in.
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
        model.generation_config = GenerationConfig()  # its own may ask for sampling
        model.register_state_dict_post_hook(_leave_out_frozen)
        model.register_load_state_dict_pre_hook(_keep_frozen)
        speed_up_products(model, adapter)
        self.train()

    def train(self, mode: bool = True) -> "CausalLMDecoder":
        super().train(mode)
        if self.held:
            self.model.eval()
        return self

    def loss(self, frames: Tensor, lengths: Sequence[int], targets: Targets) -> DecoderLoss:
        chats = self._lay_out(frames, lengths, targets.tokens, targets.lengths)
        states = sequence_states(self.model, chats.embeddings, chats.lengths, self.layout)
        predicted = targets.places
        # The state before a token predicts it.
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
        """Return the FLOPs of a training step on clips of T frames; what the meters divide by."""
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
                f"The checkpoint was trained through {state['language_model']} with weights {state['weights']}; "
                f"{self.identity['language_model']} holds others ({self.identity['weights']})."
            )

    def _lay_out(
        self,
        frames: Tensor,
        frame_lengths: Sequence[int],
        tokens: Tensor,
        token_lengths: Sequence[int],
    ) -> "_Chats":
        """Embed packed chats `[ΣL]` and put each clip's audio where its `AUDIO` token stands."""
        audio, audio_lengths = self.adapter(frames, frame_lengths)
        text = self.model.get_input_embeddings()(tokens.clamp(min=0))
        order, places, lengths = _interleave(token_lengths, self.audio_at, audio_lengths)
        source = torch.cat([text, audio.to(text.dtype)])
        order, places = (sent(index, source.device) for index in (order, places))
        return _Chats(source.index_select(0, order), places, lengths)


@dataclass(frozen=True)
class _Chats:
    """Chats laid end to end: embeddings `[ΣL', W]` with lengths L', and where each text token went, `[ΣL]`."""

    embeddings: Tensor
    places: Tensor
    lengths: tuple[int, ...]


def _interleave(
    token_lengths: Sequence[int], audio_at: int, audio_lengths: Sequence[int]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Say how text and audio come together when the one `AUDIO` token of each chat gives way to its audio.

    Returns:
        For each position of the whole its row among `[text; audio]`, for each text token its position, and the lengths.
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
    """Return what the language model is loaded in; where all of it is trained, nothing is frozen."""
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
    """Return the parameters that are not trained, tied ones under each of their names."""
    return {
        name: value
        for name, value in model.named_parameters(remove_duplicate=False)
        if not value.requires_grad
    }
