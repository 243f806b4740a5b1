"""Run → a directory that others load: the trained encoder, with or without a decoder, as a tower, or as a graph.

In: a run directory or one of its checkpoints. Out: a directory. Next: `load_encoder`, probes, an audio LLM, onnxruntime.

`encoder` throws the decoder away, as AuT does: `WhisperModel.from_pretrained` loads it strictly, its decoder being a shell of no
layers and one token. `whisper` keeps the decoder that the run trained beside the encoder, for recognition and captioning, or as the
start of another run. The towers are in `export.towers`, the graph in `export.onnx`; `docs/export.md` says what fits where.
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
from whisper_aut.models.pretrained import Start
from whisper_aut.training.checkpoint import is_checkpoint, read_weights
from whisper_aut.training.run_dir import RunDirectory

ExportKind = Literal["encoder", "whisper", "qwen2-audio", "qwen2.5-omni", "voxtral", "onnx"]
KINDS: tuple[ExportKind, ...] = get_args(ExportKind)
ENCODER_PREFIX = "encoder.whisper."
DECODER_PREFIX = "decoder.whisper."
MARK = ".whisper-aut-export"  # in every export, and holds its kind


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint of this project, whole, whatever strategy and number of ranks wrote it.

    Raises:
        UserError: missing, damaged, or not a checkpoint of this project.
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
    start: Start,
    out: Path,
    kind: ExportKind,
    *,
    dtype: torch.dtype = torch.float32,
    padding: Padding = "none",
) -> Path:
    """Write what a checkpoint trained as a directory that others load.

    Args:
        checkpoint: a `step-….ckpt` of a run.
        start: where that run started: it knows architecture, tokenizer and features.
        out: the directory; an earlier export there is replaced.
        kind: one of `KINDS`.
        dtype: of the weights.
        padding: what the run was trained with: a graph has it built in, `load_encoder` reads it in `config.json`.

    Raises:
        UserError: the checkpoint is unusable or lacks what is asked for, or `out` holds something else.
    """
    _refuse_foreign(out, start)
    weights = read_checkpoint(checkpoint)
    whole = out.absolute()  # "." has no name
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
    start: Start,
    out: Path,
    kind: ExportKind,
    dtype: torch.dtype,
    padding: Padding,
) -> None:
    if kind == "onnx":
        if dtype != torch.float32:
            raise UserError(
                "The ONNX graph is float32, as its log-mel needs; convert it with your runtime's own tools."
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


def _refuse_foreign(out: Path, start: Start) -> None:
    """An export replaces its directory whole: that must be an export, or nothing, and not what the run started from."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file()):
        raise UserError(
            f"{out} holds something that is no export and would be lost. Name an empty or a new folder."
        )
    if Path(start.path).resolve() == out.resolve():
        raise UserError(
            f"{out} is the model that this run started from, and would be lost. Name another folder."
        )


def _encoder_model(weights: dict[str, torch.Tensor], start: Start) -> WhisperModel:
    values = start.config.to_dict()
    # Token ids are indices into the token table, which has one row left.
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
    weights: dict[str, torch.Tensor], start: Start
) -> WhisperForConditionalGeneration:
    if not any(name.startswith(DECODER_PREFIX) for name in weights):
        raise UserError(
            "This run trained no Whisper decoder, so there is none to keep. Export the encoder: --format encoder."
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


def find_checkpoint(path: Path) -> tuple[Path, Start]:
    """Return the checkpoint to export and the start of its run.

    Raises:
        UserError: not a run or a checkpoint in one, or a run that has saved none yet.
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
            f"{run.path} has saved no checkpoint yet ({checkpoint.relative_to(run.path)} is missing)."
        )
    start = json.loads(facts.read_text())["start"]
    return checkpoint, Start(start["path"], start["revision"])


# Version 1 of huggingface_hub speaks through httpx, version 2 through its successor; both call their errors alike.
HTTPError: type[Exception] = import_module(
    type(get_session()).__module__.partition(".")[0]
).HTTPError


def push(folder: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload an export, making the repository where there is none; return the address of the commit.

    Raises:
        UserError: an impossible name, no token or no right to write, or a hub that cannot be reached.
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
