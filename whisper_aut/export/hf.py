"""Export the encoder of a run as a Hugging Face directory, as an audio tower, or as an ONNX graph.

`encoder` drops the decoder, as AuT does. `whisper` keeps the trained decoder, for recognition and
captioning or as the pretrained checkpoint of another run. Towers are in `export.towers`, the ONNX
graph is in `export.onnx`. `docs/export.md` lists which format works with which library.
"""

import json
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import get_session
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut import __version__
from whisper_aut.errors import UserError
from whisper_aut.export.onnx import write_onnx
from whisper_aut.export.towers import TOWERS, write_tower
from whisper_aut.models.encoder import TRAINED_PADDING, Padding
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.checkpoint import is_checkpoint, read_weights
from whisper_aut.training.run_dir import RunDirectory

ExportKind = Literal["encoder", "whisper", "qwen2-audio", "qwen2.5-omni", "voxtral", "onnx"]
KINDS: tuple[ExportKind, ...] = get_args(ExportKind)
ENCODER_PREFIX = "encoder.whisper."
DECODER_PREFIX = "decoder.whisper."
# Every export has this file, which contains its kind.
MARK = ".whisper-aut-export"


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Return the full weights of a checkpoint, whichever strategy and world size wrote it.

    Raises:
        UserError: If the checkpoint is missing, damaged, or not one of this project.
    """
    if not path.exists():
        raise UserError(
            f"There is no checkpoint {path}. Train first, or name a run directory under runs/."
        )
    if path.is_dir():
        weights = read_weights(path)
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[
                "state_dict"
            ]
        except Exception as error:
            raise UserError(
                f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}"
            ) from None
    if not any(name.startswith(ENCODER_PREFIX) for name in weights):
        raise UserError(f"{path} holds no encoder of whisper-aut.")
    return weights


def export_checkpoint(
    checkpoint: Path,
    start: PretrainedWhisper,
    out: Path,
    kind: ExportKind,
    *,
    dtype: torch.dtype = torch.float32,
    padding: Padding = "none",
) -> Path:
    """Export a checkpoint to a directory that other libraries load.

    Args:
        checkpoint: A `step-….ckpt` of a run.
        start: The pretrained checkpoint of that run, which defines the architecture, the
            tokenizer and the feature extractor.
        out: The directory to write. An earlier export in it is replaced.
        kind: One of `KINDS`.
        dtype: The dtype of the exported weights. The ONNX graph is always float32.
        padding: The padding mode that the run was trained with. It is built into an ONNX graph
            and saved in `config.json`, from which `load_encoder` reads it.

    Returns:
        The directory, `out`.

    Raises:
        UserError: If the checkpoint is unusable or lacks the requested part, if the encoder does
            not fit the requested format, or if `out` contains anything but an export.
    """
    _refuse_foreign(out, start)
    weights = read_checkpoint(checkpoint)
    whole = out.absolute()  # Path(".") has an empty name
    partial = whole.with_name(f".{whole.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(weights, start, partial, kind, dtype, padding)
        (partial / MARK).write_text(f"{kind}\n")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return out


def _write(
    weights: dict[str, torch.Tensor],
    start: PretrainedWhisper,
    out: Path,
    kind: ExportKind,
    dtype: torch.dtype,
    padding: Padding,
) -> None:
    if kind == "onnx":
        if dtype != torch.float32:
            raise UserError(
                "The ONNX graph is float32, as its log-mel needs; "
                "convert it with your runtime's own tools."
            )
        write_onnx(_encoder_model(weights, start).encoder, padding, out)
        return
    if kind in TOWERS:
        encoder = _encoder_model(weights, start).encoder.state_dict()
        write_tower(
            kind, {name: weight.to(dtype) for name, weight in encoder.items()}, start.config, out
        )
    else:
        model = (
            _encoder_model(weights, start) if kind == "encoder" else _whisper_model(weights, start)
        )
        setattr(model.config, TRAINED_PADDING, padding)
        model.to(dtype).save_pretrained(out)  # pyright: ignore[reportArgumentType]
    start.feature_extractor.save_pretrained(out)
    if kind == "whisper":
        start.tokenizer.save_pretrained(out)
        start.generation_config.save_pretrained(out)


def _refuse_foreign(out: Path, start: PretrainedWhisper) -> None:
    """Raise if exporting to `out` would delete something that is not an earlier export."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file()):
        raise UserError(
            f"{out} holds something that is no export and would be lost. "
            "Name an empty or a new folder."
        )
    if Path(start.path).resolve() == out.resolve():
        raise UserError(
            f"{out} is the model that this run started from, and would be lost. "
            "Name another folder."
        )


def _encoder_model(weights: dict[str, torch.Tensor], start: PretrainedWhisper) -> WhisperModel:
    """Return the encoder as a `WhisperModel` whose decoder has no layers and one token.

    `WhisperModel.from_pretrained` then loads the export without missing or unexpected weights.
    """
    values = start.config.to_dict()
    # Token ids index the token embedding, which has only one row left.
    values |= {
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
    model = WhisperModel(WhisperConfig(**values))
    _fill(model.encoder, weights, ENCODER_PREFIX)
    return model


def _whisper_model(
    weights: dict[str, torch.Tensor], start: PretrainedWhisper
) -> WhisperForConditionalGeneration:
    if not any(name.startswith(DECODER_PREFIX) for name in weights):
        raise UserError(
            "This run trained no Whisper decoder, so there is none to keep. "
            "Export the encoder: --format encoder."
        )
    model = WhisperForConditionalGeneration(start.config)
    _fill(model.model.encoder, weights, ENCODER_PREFIX)
    _fill(model.model.decoder, weights, DECODER_PREFIX)
    model.tie_weights()
    return model


def _fill(
    module: WhisperEncoder | torch.nn.Module, weights: dict[str, torch.Tensor], prefix: str
) -> None:
    own: dict[str, Any] = {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }
    module.load_state_dict(own, strict=True)


def find_checkpoint(path: Path) -> tuple[Path, PretrainedWhisper]:
    """Return the checkpoint to export and the pretrained checkpoint that its run started from.

    Args:
        path: A run directory, of which the last checkpoint is taken, or one of its checkpoints.

    Raises:
        UserError: If the path is neither, or if the run has not saved a checkpoint yet.
    """
    named = path.is_file() or is_checkpoint(path)
    run = RunDirectory(path.parent.parent if named else path)
    facts = run.environment
    if not facts.exists():
        raise UserError(
            f"{path} is neither a run directory nor a checkpoint in one. Runs lie under "
            "runs/NAME/; runs/NAME/latest is the newest."
        )
    checkpoint = path if named else run.last_checkpoint
    if not checkpoint.exists():
        raise UserError(
            f"{run.path} has saved no checkpoint yet "
            f"({checkpoint.relative_to(run.path)} is missing)."
        )
    start = json.loads(facts.read_text())["pretrained"]
    return checkpoint, PretrainedWhisper(start["path"], start["revision"])


# huggingface_hub 1 uses httpx, version 2 its successor. The base error has the same name in both.
HTTPError: type[Exception] = import_module(
    type(get_session()).__module__.partition(".")[0]
).HTTPError


def push(folder: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload an export to the Hugging Face hub, creating the repository if necessary.

    Args:
        folder: The export.
        repository: `ORG/NAME` on the hub.
        private: Whether a new repository is private.
        api: The client to use. Defaults to one with the credentials of this machine.

    Returns:
        The URL of the commit.

    Raises:
        UserError: If the name is invalid, the token is missing or may not write, or the hub
            cannot be reached.
    """
    if repository.count("/") != 1:
        raise UserError(f"--push takes ORG/NAME, not {repository!r}.")
    api = api or HfApi(library_name="whisper-aut", library_version=__version__)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        message = f"Export of whisper-aut {__version__}"
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except LocalTokenNotFoundError:
        raise UserError("There is no token to push with. Log in first: hf auth login") from None
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name for a repository: {error}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        hint = " Log in first: hf auth login" if status == 401 else ""
        raise UserError(
            f"The hub refused {repository} with status {status}: {str(error).splitlines()[0]}{hint}"
        ) from None
    except (OSError, HTTPError) as error:
        raise UserError(
            f"The hub cannot be reached: {error}. What was exported lies in {folder}."
        ) from None
    return str(commit.commit_url)
