"""Export the encoder of a run as a Hugging Face directory, as an audio tower, or as an ONNX graph.

`encoder` drops the decoder, as AuT does. `whisper` has the trained decoder, for recognition and
captioning or as the pretrained checkpoint of another run, or the pretrained one. Towers are in
`export.towers`, the ONNX graph is in `export.onnx`. `docs/export.md` lists which format works with
which library.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from rich.filesize import decimal
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

from whisper_aut import __version__
from whisper_aut.errors import UserError
from whisper_aut.export.onnx import write_onnx
from whisper_aut.export.towers import TOWERS, write_tower
from whisper_aut.models.encoder import TRAINED_PAD_TO_30S, TRAINED_PADDING, Padding, merge_lora
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.checkpoint import is_checkpoint, read_weights
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.utils import read_json

ExportKind = Literal[
    "encoder", "whisper", "qwen2-audio", "qwen2.5-omni", "audio-flamingo-3", "voxtral", "onnx"
]
DecoderWeights = Literal["trained", "pretrained"]
KINDS: tuple[ExportKind, ...] = get_args(ExportKind)
ENCODER_PREFIX = "encoder.whisper."
DECODER_PREFIX = "decoder.whisper."
# Every export has this file, which contains its kind.
MARKER = ".whisper-aut-export"
# Token ids index the token embedding, which has a single row if the decoder is dropped.
NO_DECODER = {
    "decoder_layers": 0,
    "vocab_size": 1,
    "max_target_positions": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "architectures": ["WhisperModel"],
}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the full weights of a checkpoint, whichever strategy and world size wrote it.

    They are the moving average of the weights if the run has one (`optim.ema_decay`). Low-rank
    updates of the encoder (`model.lora_rank`) are merged into its weights.

    Raises:
        UserError: The checkpoint is missing, damaged, or not one of this project.
    """
    if not path.exists():
        raise UserError(
            f"There is no checkpoint {path}. Train first, or give a run directory under runs/."
        )
    if path.is_dir():
        weights = read_weights(path, averaged=True)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            weights = content["state_dict"]
        except Exception as error:
            problem = str(error).splitlines()[0]
            raise UserError(f"{path} is not a readable checkpoint: {problem}") from None
    if not any(name.startswith(ENCODER_PREFIX) for name in weights):
        raise UserError(f"{path} does not contain an encoder of whisper-aut.")
    return merge_lora(weights)


def find_checkpoint(path: Path) -> tuple[Path, PretrainedWhisper]:
    """Return the checkpoint to export and the pretrained checkpoint that its run started from.

    Args:
        path: A run directory, of which the last checkpoint is taken, or one of its checkpoints.

    Raises:
        UserError: The path is neither, or the run has not saved a checkpoint yet.
    """
    given = path.is_file() or is_checkpoint(path)
    run = RunDirectory(path.parent.parent if given else path)
    if not run.environment.exists():
        raise UserError(
            f"{path} is neither a run directory nor a checkpoint in one. Give a directory "
            "runs/NAME/TIMESTAMP; runs/NAME/latest is the newest."
        )
    checkpoint = path if given else run.last_checkpoint
    if not checkpoint.exists():
        raise UserError(
            f"{run.path} has not saved a checkpoint yet "
            f"({checkpoint.relative_to(run.path)} is missing)."
        )
    match read_json(run.environment).get("pretrained"):
        case {"path": str(name), "revision": str(revision)}:
            return checkpoint, PretrainedWhisper(name, revision)
    raise UserError(f"{run.environment} is damaged, or of another release. Train again.")


def export_checkpoint(
    checkpoint: Path,
    pretrained: PretrainedWhisper,
    out: Path,
    kind: ExportKind,
    *,
    dtype: torch.dtype = torch.float32,
    padding: Padding = "none",
    pad_to_30s: float = 0.0,
    interpolate: float = 1.0,
    decoder: DecoderWeights = "trained",
) -> Path:
    """Export a checkpoint to a directory that other libraries load, and return the directory.

    Args:
        checkpoint: A `step-….ckpt` of a run.
        pretrained: The checkpoint that the run started from, which defines the architecture, the
            tokenizer and the feature extractor.
        out: The directory to write. An earlier export in it is replaced.
        kind: One of `KINDS`.
        dtype: The dtype of the exported weights. The ONNX graph is always float32.
        padding: The padding mode that the run was trained with. It is built into an ONNX graph
            and saved in `config.json`, from which `load_encoder` reads it.
        pad_to_30s: The fraction of clips that were padded to 30 s with padding `none`, which is
            saved too.
        interpolate: The fraction of the trained weights, see `interpolated`.
        decoder: The decoder of the format `whisper`: that of the run, or the pretrained one, which
            only knows clips padded to 30 s. `config.json` then says so.

    Raises:
        UserError: The checkpoint is unusable or lacks the requested part, the encoder does not
            fit the requested format, or `out` contains anything but an export.
    """
    _check_replaceable(out, pretrained)
    if kind == "onnx" and dtype != torch.float32:
        raise UserError(
            "The ONNX graph is always float32, because its log-mel needs the precision. Convert it "
            "with the tools of your runtime."
        )
    weights = read_checkpoint(checkpoint)
    if interpolate != 1:
        weights = interpolated(weights, pretrained, interpolate)
    if decoder == "pretrained":
        start = pretrained.model.model.decoder.state_dict()
        weights |= {DECODER_PREFIX + name: weight for name, weight in start.items()}
        padding, pad_to_30s = "30s", 0.0
    full = out.resolve()  # a link to a folder stays a link
    partial = full.with_name(f".{full.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model = _whisper_model(weights, pretrained, with_decoder=kind == "whisper")
        if kind == "onnx":
            write_onnx(model.get_encoder(), padding, partial)
        elif kind in TOWERS:
            encoder = model.get_encoder().state_dict()
            write_tower(kind, encoder, pretrained.config, partial, dtype)
        else:
            setattr(model.config, TRAINED_PADDING, padding)
            if pad_to_30s:
                setattr(model.config, TRAINED_PAD_TO_30S, pad_to_30s)
            model.to(dtype).save_pretrained(partial)
        if kind != "onnx":
            pretrained.feature_extractor.save_pretrained(partial)
        if kind == "whisper":
            pretrained.tokenizer.save_pretrained(partial)
            pretrained.generation_config.save_pretrained(partial)
        (partial / MARKER).write_text(f"{kind}\n")
        shutil.rmtree(full, ignore_errors=True)
        os.replace(partial, full)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def interpolated(
    weights: dict[str, Tensor], pretrained: PretrainedWhisper, fraction: float
) -> dict[str, Tensor]:
    """Return `fraction` · trained + (1 − `fraction`) · pretrained weights, for all of Whisper.

    This keeps more of what the pretrained checkpoint can do (WiSE-FT, arXiv 2109.01903).
    """
    parts: dict[str, nn.Module] = {}
    if any(name.startswith(DECODER_PREFIX) for name in weights):
        parts[DECODER_PREFIX] = pretrained.model.model.decoder
    parts[ENCODER_PREFIX] = pretrained.encoder
    mixed = dict(weights)
    for prefix, module in parts.items():
        for name, start in module.state_dict().items():
            mixed[prefix + name] = torch.lerp(start, weights[prefix + name].float(), fraction)
    return mixed


def _check_replaceable(out: Path, pretrained: PretrainedWhisper) -> None:
    """Raise if exporting to `out` would delete something that is not an earlier export."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file()):
        raise UserError(
            f"{out} contains something other than an export, which would be lost. "
            "Give an empty or a new folder."
        )
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError(f"{out} is the working directory. Give another folder.")
    if Path(pretrained.path).resolve() == out.resolve():
        raise UserError(
            f"{out}, the model that this run started from, would be lost. Give another folder."
        )


def _whisper_model(
    weights: dict[str, Tensor], pretrained: PretrainedWhisper, *, with_decoder: bool
) -> Any:
    """Return a `WhisperForConditionalGeneration`, or a `WhisperModel` with an empty decoder.

    `from_pretrained` loads both without missing or unexpected weights.
    """
    if not with_decoder:
        model = WhisperModel(WhisperConfig(**(pretrained.config.to_dict() | NO_DECODER)))
        _load(model.encoder, weights, ENCODER_PREFIX)
        for weight in model.decoder.parameters():  # without them, exports would differ by chance
            nn.init.zeros_(weight)
        return model
    if not any(name.startswith(DECODER_PREFIX) for name in weights):
        raise UserError(
            "This run did not train a Whisper decoder. Export its encoder (--format encoder), or "
            "add the pretrained decoder (--decoder pretrained)."
        )
    model = WhisperForConditionalGeneration(pretrained.config)
    _load(model.model.encoder, weights, ENCODER_PREFIX)
    _load(model.model.decoder, weights, DECODER_PREFIX)
    model.tie_weights()
    return model


def _load(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    names = [name for name in weights if name.startswith(prefix)]
    module.load_state_dict({name.removeprefix(prefix): weights[name] for name in names})


def push(folder: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload an export to the Hugging Face hub and return the URL of the commit.

    Args:
        folder: The export.
        repository: `ORG/NAME` on the hub, created if necessary.
        private: Whether a new repository is private.
        api: The client to use. Defaults to one with the credentials of this machine.

    Raises:
        UserError: The name is invalid, the token is missing or may not write, or the hub cannot
            be reached.
    """
    check_repository(repository)
    api = api or HfApi(library_name="whisper-aut", library_version=__version__)
    message = f"Export of whisper-aut {__version__}"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=MARKER
        )
    except LocalTokenNotFoundError:
        raise UserError("There is no token to push with. Log in first: hf auth login") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = " Log in first: hf auth login" if status == 401 else ""
        raise UserError(
            f"{repository}: the hub answered {status}, {str(error).splitlines()[0]}{hint}"
        ) from None
    except (OSError, HTTPError) as error:
        raise UserError(f"The hub cannot be reached: {error}. The export is in {folder}.") from None
    return str(commit.commit_url)


def describe_push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Return what `push` would upload and where, without a connection.

    Raises:
        UserError: The name is invalid.
    """
    check_repository(repository)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    rows = [f"  {decimal(file.stat().st_size):>10}  {file.relative_to(folder)}" for file in files]
    total = decimal(sum(file.stat().st_size for file in files))
    where = f"{repository} ({'private' if private else 'public'} if it is new)"
    return "\n".join([f"Would upload {total} to {where}:", *rows, "Nothing was uploaded."])


def check_repository(repository: str) -> None:
    """Raise a UserError if this is not the name of a repository on the hub."""
    if repository.count("/") != 1:
        raise UserError(f"--push takes ORG/NAME, not {repository!r}.")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is not a valid repository name: {error}") from None
