"""Load pretrained Whisper checkpoints from a directory or the hub, strictly and without pickle."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
)
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
from whisper_aut.utils import read_json

# Raised by transformers for a directory or download that it cannot load.
UNLOADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
LOADING: dict[str, Any] = {
    "use_safetensors": True,
    "dtype": torch.float32,
    "output_loading_info": True,
}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
EXAMPLE = "openai/whisper-tiny"  # in error messages
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# Vocabulary size of every `whisper-*.en`. Multilingual checkpoints have 51,865 or 51,866 tokens.
ENGLISH_ONLY_TOKENS = 51_864
# Width, encoder layers, decoder layers, heads, mel bins and vocabulary, so that runs can be planned
# without access to the hub.
WHISPER_SIZES = {
    "openai/whisper-tiny": (384, 4, 4, 6, 80, 51_865),
    "openai/whisper-base": (512, 6, 6, 8, 80, 51_865),
    "openai/whisper-small": (768, 12, 12, 12, 80, 51_865),
    "openai/whisper-medium": (1024, 24, 24, 16, 80, 51_865),
    "openai/whisper-large": (1280, 32, 32, 20, 80, 51_865),
    "openai/whisper-large-v2": (1280, 32, 32, 20, 80, 51_865),
    "openai/whisper-large-v3": (1280, 32, 32, 20, 128, 51_866),
    "openai/whisper-large-v3-turbo": (1280, 32, 4, 20, 128, 51_866),
}


@dataclass
class PretrainedWhisper:
    """A pretrained Whisper checkpoint. Its parts are loaded when they are first used.

    Args:
        path: hub id or directory.
        revision: branch, tag or commit on the hub. Empty for the default branch.
        random_init: replace the weights with random ones, drawn from PyTorch's global generator.
        empty: leave weights in memory uninitialized and read none, on a rank that gets them from
            the first rank.
    """

    path: str
    revision: str = ""
    random_init: bool = False
    empty: bool = False

    @cached_property
    def config(self) -> WhisperConfig:
        """The configuration.

        Raises:
            UserError: there is no Whisper checkpoint, or it is a PEFT adapter, or it uses layer
                dropout.
        """
        if Path(self.path).is_dir():
            check_not_adapter(self.path)
        config = self._load(WhisperConfig, CONFIG)
        # Check adapters on the hub only now: the load above has reported an unreachable hub.
        check_not_adapter(find_cached(self.path, self.revision, CONFIG), self.revision)
        if config.model_type != "whisper":
            raise UserError(
                f"{self.path} is a {config.model_type!r} model, not a Whisper checkpoint."
            )
        if config.encoder_layerdrop or config.decoder_layerdrop:
            raise UserError(
                f"{self.path} uses layer dropout, which packed clips do not support; set "
                "encoder_layerdrop and decoder_layerdrop to 0 in its config.json."
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
                f"{self.path} is an encoder without a decoder, which decoder=whisper needs. Use a "
                "full checkpoint, or another decoder."
            )
        if self.empty:
            return uninitialized(WhisperForConditionalGeneration, self.config)
        if self.random_init:
            return WhisperForConditionalGeneration(self.config)
        model, info = self._load(WhisperForConditionalGeneration, CONFIG, WEIGHTS, **LOADING)
        # The output layer is tied to the token embedding, so checkpoints may leave it out.
        check_loaded_weights(self.path, info, may_be_missing={"proj_out.weight"})
        return model

    @cached_property
    def encoder(self) -> WhisperEncoder:
        """The encoder, in float32. Unless `model` was used before, the decoder is not loaded.

        Raises:
            UserError: there is no Whisper checkpoint or no safetensors file, or weights are missing
                or have the wrong shape.
        """
        if "model" in self.__dict__:
            return self.model.model.encoder
        if self.empty:
            return uninitialized(WhisperEncoder, self.config)
        if self.random_init:
            return WhisperEncoder(self.config)
        names = {r"^(model\.)?encoder\.": ""}
        options = {"key_mapping": names, **LOADING}
        encoder, info = self._load(WhisperEncoder, CONFIG, WEIGHTS, **options)
        check_loaded_weights(self.path, info | {"unexpected_keys": ()})  # the decoder's
        return encoder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load(WhisperTokenizer, *TOKENIZER)

    def token_id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]

    @cached_property
    def feature_extractor(self) -> WhisperFeatureExtractor:
        return self._load(WhisperFeatureExtractor, "preprocessor_config.json")

    @property
    def multilingual(self) -> bool:
        """Whether the checkpoint was trained with language and task tokens."""
        return bool(self.generation_config.is_multilingual)  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def generation_config(self) -> GenerationConfig:
        source = find_cached(self.path, self.revision, "generation_config.json")
        try:
            check_hub(source, self.revision)
            config = GenerationConfig.from_pretrained(source, revision=self.revision or "main")
        except OSError:  # hand-made checkpoints often have none
            config = GenerationConfig.from_model_config(self.config)
        if getattr(config, "is_multilingual", None) is None:
            # Tokenizers of English-only checkpoints contain language tokens too, but untrained.
            english_only = self.config.vocab_size == ENGLISH_ONLY_TOKENS
            set_prompt_tokens(config, self.tokenizer, multilingual=not english_only)
        return config

    def _load(self, kind: Any, *files: str, **options: Any) -> Any:
        check_model_path(self.path)
        return load_pretrained(kind, self.path, self.revision, *files, **options)


def load_pretrained(
    kind: Any,
    path: str,
    revision: str,
    *files: str,
    what: str = "Whisper checkpoint",
    example: str = EXAMPLE,
    **options: Any,
) -> Any:
    """Call `kind.from_pretrained` for a directory or a hub model, which is looked up in the cache.

    Args:
        files: the files that the cache needs to have, see `find_cached`.
        what, example: for error messages, what is loaded and the name of one.
        options: of `from_pretrained`.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    source = find_cached(path, revision, *files)
    try:
        check_hub(source, revision)
        with quiet_loading():
            return kind.from_pretrained(source, revision=revision or "main", **options)
    except UNLOADABLE as error:
        raise UserError(_describe_missing(path, error, what, example)) from None


def uninitialized(build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Build a model of transformers, in eval mode, whose weights are not written to memory."""
    with torch.device("meta"):
        model = build(*arguments, **options)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model.eval()


def whisper_config_of_size(
    width: int,
    encoder_layers: int,
    decoder_layers: int,
    heads: int,
    num_mel_bins: int,
    vocabulary: int,
) -> WhisperConfig:
    """Return the configuration of a Whisper with these sizes.

    All its special tokens are the last token of the vocabulary until they are set.
    """
    tokens = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), vocabulary - 1
    )
    return WhisperConfig(
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_mel_bins=num_mel_bins,
        vocab_size=vocabulary,
        **tokens,
    )


def load_whisper_config(path: str, revision: str = "") -> WhisperConfig:
    """Return the configuration of a Whisper: from a directory, `WHISPER_SIZES` or the hub.

    Raises:
        UserError: there is no such directory or model.
    """
    if not Path(path).is_dir() and path in WHISPER_SIZES:
        return whisper_config_of_size(*WHISPER_SIZES[path])
    return PretrainedWhisper(path, revision).config


def set_prompt_tokens(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, *, multilingual: bool
) -> None:
    """Write Whisper's prompt tokens into a generation config, for `generate` of transformers."""
    ids: Any = tokenizer.get_vocab()
    fields: Any = config
    fields.is_multilingual = multilingual and "<|transcribe|>" in ids
    fields.no_timestamps_token_id = ids.get("<|notimestamps|>")
    if fields.is_multilingual:
        languages = [f"<|{code}|>" for code in LANGUAGES]
        fields.lang_to_id = {token: ids[token] for token in languages if token in ids}
        fields.task_to_id = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; see `check_loaded_weights`."""
    level = transformers_logging.get_verbosity()
    progress_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if progress_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator inside the block, and restore it afterwards.

    `torch.manual_seed` would also reseed the generators of all GPUs, which a running training may
    use for dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def check_loaded_weights(
    path: str,
    info: dict[str, Any],
    may_be_missing: set[str] | None = None,
    *,
    kind: str = "Whisper model",
) -> None:
    """Raise `UserError` if weights of a checkpoint are missing, unknown or of the wrong shape.

    `info` is the loading info that `from_pretrained` returns.
    """
    problems = {
        "lacks": set(info["missing_keys"]) - (may_be_missing or set()),
        "has the wrong shape for": {str(key) for key in info.get("mismatched_keys", ())},
        "has": set(info["unexpected_keys"]),
    }
    for verb, keys in problems.items():
        if keys:
            names = ", ".join(sorted(keys)[:5]) + (", …" if len(keys) > 5 else "")
            what = f"unknown weights for a {kind}" if verb == "has" else f"weights of a {kind}"
            raise UserError(f"The checkpoint {path} {verb} {len(keys)} {what}: {names}.")


def find_cached(path: str, revision: str, *files: str) -> str:
    """Return the directory of a hub model in the local cache if it has these files, else `path`.

    By its hub id, transformers asks the hub about every file. A cached model is therefore not
    updated; `hf download` does that.
    """
    if Path(path).is_dir() or not _is_hub_id(path):
        return path
    cached = [try_to_load_from_cache(path, name, revision=revision or "main") for name in files]
    folders = [Path(file).parent for file in cached if isinstance(file, str)]
    return str(folders[0]) if len(folders) == len(files) else path


def check_hub(path: str, revision: str) -> None:
    """Raise `OSError` if a model is not on disk and the hub does not answer one request.

    The client of the hub repeats failed requests for most of a minute. It is left to load models
    that are in the cache in another form, such as several files of weights.
    """
    if Path(path).is_dir():
        return
    try:
        if not isinstance(try_to_load_from_cache(path, CONFIG, revision=revision or "main"), str):
            get_hf_file_metadata(hf_hub_url(path, CONFIG))
    except (HfHubHTTPError, HFValidationError):
        return  # the load explains what is wrong with the name, the file or the token
    except HTTPError as error:
        raise OSError(str(error)) from None


def check_model_path(path: str) -> None:
    """Raise `UserError` if a path is neither a directory nor like a hub id.

    A name in a folder of runs is not a hub id. This avoids slow requests to the hub.
    """
    folder = Path(path)
    if folder.is_dir():
        return
    if not _is_hub_id(path):
        raise UserError(_describe_missing(path, OSError(), "model", EXAMPLE))
    if any(folder.parent.glob("*/latest")):
        names = sorted(entry.name for entry in folder.parent.glob("[!.]*") if entry.is_dir())
        raise UserError(
            f"There is no {path}.{nearest(folder.name, names)} {folder.parent} contains: "
            f"{', '.join(names)}."
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
        base = read_json(Path(found), default={}).get("base_model_name_or_path")
        raise UserError(
            f"{path} is a PEFT adapter of {base or 'its base model'}, not a model. Merge it first: "
            f"peft.PeftModel.from_pretrained(model, {path!r}).merge_and_unload()"
            ".save_pretrained(FOLDER), with the tokenizer's files."
        )


def _describe_missing(path: str, error: Exception, what: str, example: str) -> str:
    """Return an error message for a checkpoint that could not be loaded because of `error`."""
    folder = Path(path)
    if folder.is_dir():
        files = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"{path} is not a usable {what}: {reason}\nA checkpoint has config.json, "
            "model.safetensors and, for training, the tokenizer's files. The directory contains "
            f"{files}."
        )
    if not _is_hub_id(path):
        return (
            f"There is no model directory {path}. Give a directory in Hugging Face's format or a "
            f"hub id such as {example}."
        )
    return (
        f"{path} is neither a local directory nor a model on the hub that can be reached.\n"
        f"Check the name and the connection, give a local directory, or run: hf download {path}"
    )


def _is_hub_id(path: str) -> bool:
    return not path.startswith((".", "/", "~")) and path.count("/") == 1
