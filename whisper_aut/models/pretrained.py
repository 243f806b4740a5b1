"""Load pretrained Whisper checkpoints from a directory or the hub, strictly and without pickle."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from whisper_aut.errors import UserError, nearest

# Raised by transformers for a directory or download that it cannot load.
UNLOADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
LOADING: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
# Weights that checkpoints may leave out: `proj_out` is tied to the token embedding.
MAY_BE_MISSING = {"proj_out.weight"}
# Vocabulary size of every `whisper-*.en`. Multilingual checkpoints have 51,865 or 51,866 tokens.
ENGLISH_ONLY_TOKENS = 51_864


@dataclass
class PretrainedWhisper:
    """A pretrained Whisper checkpoint. Its parts are loaded when they are first used.

    Args:
        path: hub id or directory.
        revision: branch, tag or commit on the hub. Empty for the default branch.
        random_init: replace the weights with random ones, drawn from PyTorch's global generator.
    """

    path: str
    revision: str = ""
    random_init: bool = False

    @cached_property
    def config(self) -> WhisperConfig:
        """The configuration.

        Raises:
            UserError: there is no Whisper checkpoint, or it is a PEFT adapter, or it uses layer
                dropout.
        """
        if Path(self.path).is_dir():
            check_not_adapter(self.path)
        config = self._load(WhisperConfig.from_pretrained, self.path)
        # Check adapters on the hub only now: the load above has reported an unreachable hub.
        check_not_adapter(self.path, self.revision)
        if config.model_type != "whisper":
            raise UserError(
                f"{self.path} is a {config.model_type!r} model; a Whisper checkpoint is expected."
            )
        if config.encoder_layerdrop or config.decoder_layerdrop:
            raise UserError(
                f"{self.path} sets layer dropout, which packed clips do not support; "
                "set it to 0 in its config.json."
            )
        return config

    @cached_property
    def model(self) -> WhisperForConditionalGeneration:
        """Encoder and decoder, in float32.

        Raises:
            UserError: weights are missing, or the checkpoint is an export without a decoder.
        """
        if self.config.decoder_layers == 0:
            raise UserError(
                f"{self.path} holds an encoder without its decoder, so the whisper decoder cannot "
                "start from it. Start from a full checkpoint, or pick another decoder."
            )
        if self.random_init:
            return WhisperForConditionalGeneration(self.config)
        model, info = self._load(
            WhisperForConditionalGeneration.from_pretrained,
            self.path,
            output_loading_info=True,
            **LOADING,
        )
        check_loaded_weights(self.path, info, MAY_BE_MISSING)
        return model

    @cached_property
    def encoder(self) -> WhisperEncoder:
        """The encoder, in float32. Unless `model` was used before, the decoder is not loaded."""
        if "model" in self.__dict__:
            return self.model.model.encoder
        return (
            load_whisper_encoder(self.path, self.revision)
            if not self.random_init
            else WhisperEncoder(self.config)
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load(WhisperTokenizer.from_pretrained, self.path)

    def token_id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]

    @cached_property
    def feature_extractor(self) -> WhisperFeatureExtractor:
        return self._load(WhisperFeatureExtractor.from_pretrained, self.path)

    @property
    def multilingual(self) -> bool:
        """Whether the checkpoint was trained with language and task tokens."""
        return bool(self.generation_config.is_multilingual)  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def generation_config(self) -> GenerationConfig:
        try:
            config = GenerationConfig.from_pretrained(self.path, revision=self.revision or "main")
        except OSError:  # hand-made checkpoints often have none
            config = GenerationConfig.from_model_config(self.config)
        if getattr(config, "is_multilingual", None) is None:
            # Tokenizers of English-only checkpoints contain language tokens too, but untrained.
            english_only = self.config.vocab_size == ENGLISH_ONLY_TOKENS
            set_prompt_tokens(config, self.tokenizer, multilingual=not english_only)
        return config

    def _load(self, loader: Any, path: str, **options: Any) -> Any:
        check_model_path(path)
        try:
            with quiet_loading():
                return loader(path, revision=self.revision or "main", **options)
        except UNLOADABLE as error:
            raise UserError(describe_missing(path, error)) from None


def set_prompt_tokens(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, *, multilingual: bool
) -> None:
    """Write Whisper's prompt tokens into a generation config, for `generate` of transformers.

    Args:
        config: the generation config, changed in place.
        tokenizer: the tokenizer of the checkpoint.
        multilingual: whether the checkpoint was trained with language and task tokens.
    """
    ids = tokenizer.get_vocab()
    languages = [f"<|{code}|>" for code in LANGUAGES]
    tokens: dict[str, Any] = {
        "is_multilingual": multilingual and "<|transcribe|>" in ids,
        "no_timestamps_token_id": ids.get("<|notimestamps|>"),
    }
    if tokens["is_multilingual"]:
        tokens["lang_to_id"] = {token: ids[token] for token in languages if token in ids}
        tokens["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    for name, value in tokens.items():
        setattr(config, name, value)


def load_whisper_encoder(path: str, revision: str = "") -> WhisperEncoder:
    """Load only the encoder of a Whisper checkpoint. All its weights must be present.

    Args:
        path: directory or hub id.
        revision: branch, tag or commit on the hub. Empty for the default branch.

    Raises:
        UserError: there is no Whisper checkpoint or no safetensors file, or weights are missing or
            have the wrong shape.
    """
    check_model_path(path)
    try:
        with quiet_loading():
            loaded: Any = WhisperEncoder.from_pretrained(
                path,
                revision=revision or "main",
                key_mapping={r"^(model\.)?encoder\.": ""},
                output_loading_info=True,
                **LOADING,
            )
            encoder, info = loaded
    except UNLOADABLE as error:
        raise UserError(describe_missing(path, error)) from None
    check_loaded_weights(path, info, set(), only_missing=True)
    return encoder


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; see `check_loaded_weights`."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_loaded_weights(
    path: str,
    info: dict[str, Any],
    allowed: set[str],
    *,
    only_missing: bool = False,
    kind: str = "Whisper model",
) -> None:
    """Raise `UserError` if weights of a checkpoint are missing, unknown or of the wrong shape.

    Args:
        path: the checkpoint, for the error message.
        info: the loading info that `from_pretrained` returns.
        allowed: weights that may be missing.
        only_missing: accept weights that the model does not have.
        kind: the kind of model, for the error message.
    """
    missing = sorted(set(info["missing_keys"]) - allowed)
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    unexpected = [] if only_missing else sorted(info["unexpected_keys"])
    for what, keys in (
        ("lacks", missing),
        ("has other shapes for", mismatched),
        ("has no place for", unexpected),
    ):
        if keys:
            listed = ", ".join(map(str, keys[:5])) + (" …" if len(keys) > 5 else "")
            raise UserError(
                f"The checkpoint {path} {what} {len(keys)} weights of a {kind}: {listed}."
            )


def check_model_path(path: str) -> None:
    """Raise `UserError` if a path is neither a directory nor like a hub id.

    A path in a folder of runs is not taken as a hub id. This avoids slow requests to the hub.
    """
    place = Path(path)
    if place.is_dir():
        return
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(describe_missing(path, OSError()))
    # The parent is a folder of runs, not the owner of a model on the hub.
    if any(place.parent.glob("*/latest")):
        there = sorted(
            entry.name
            for entry in place.parent.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        raise UserError(
            f"There is no {path}.{nearest(place.name, there)} {place.parent} has: "
            f"{', '.join(there) or 'no folder'}."
        )


def check_not_adapter(path: str, revision: str = "") -> None:
    """Raise `UserError` if a directory or hub id contains a PEFT adapter and no model.

    `load_encoder` applies such adapters, but training does not support them.
    """
    try:
        found = find_adapter_config_file(path, revision=revision or "main")
    except OSError:  # there is no such model, or no connection: the load reports it
        return
    if found:
        base = (
            json.loads(Path(found).read_text()).get("base_model_name_or_path") or "its base model"
        )
        raise UserError(
            f"{path} is a PEFT adapter of {base}, not a model. Merge it first: "
            f"peft.PeftModel.from_pretrained(model, {path!r}).merge_and_unload()"
            ".save_pretrained(FOLDER), with the tokenizer's files."
        )


def describe_missing(
    path: str,
    error: Exception,
    *,
    kind: str = "Whisper checkpoint",
    example: str = "openai/whisper-tiny",
) -> str:
    """Return an error message for a checkpoint that cannot be loaded.

    Args:
        path: directory or hub id.
        error: the error that loading raised.
        kind: the kind of checkpoint that was expected.
        example: a valid hub id.
    """
    folder = Path(path)
    if folder.is_dir():
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"{path} is not a usable {kind}: {first}\nIt should hold config.json, "
            "model.safetensors and, for training, "
            f"the tokenizer's files; it holds {there}."
        )
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        return (
            f"There is no model directory {path}. Give a directory in Hugging Face's format or a "
            f"hub id such as {example}."
        )
    return (
        f"{path} is neither a directory here nor a model that could be reached on the hub.\n"
        f"Check the name and the connection, or fetch it first: hf download {path}"
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator inside the block, and restore it afterwards.

    `torch.manual_seed` would also reseed the generators of all GPUs, which a running training may
    use for dropout.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
