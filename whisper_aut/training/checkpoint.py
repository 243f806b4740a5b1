"""Checkpoints as directories of named tensors, independent of the strategy and number of ranks.

A directory `step-0000100.ckpt/` contains `weights-*.safetensors`, `optimizer-*.safetensors`,
`state.pt` and `manifest.json`. `PlainState` and `DeepSpeedState` load the tensors back, also on
another number of ranks.

A checkpoint is written under a temporary name and renamed once the files of all ranks are on disk,
so a directory with the final name is complete. The manifest is written last. It records the size
and SHA-256 of every file, which reveals later damage. Nothing is unpickled: tensors are stored as
safetensors, and `torch.load(weights_only=True)` reads the rest.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from whisper_aut.errors import UserError

SUFFIX, PREFIX = ".ckpt", "step-"
LAST, BEST = f"last{SUFFIX}", f"best{SUFFIX}"
MANIFEST, STATE = "manifest.json", "state.pt"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
FORMAT = 1
HASH_BLOCK_BYTES = 1 << 24
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class FileMetadata:
    """Size and hash of a file at the time it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint.

    Attributes:
        step: Number of completed optimizer steps.
        clips_per_step: Clips in an optimizer step over all ranks and micro-batches. A run can only
            be resumed with the same number. 0 if steps are measured in seconds of audio.
        written_by: Strategy, ranks and precision, for information only.
        files: Every file except the manifest itself.
        aliases: Maps the other names of a tied weight to the name it is stored under.
        format: Version of the checkpoint format.
    """

    step: int
    clips_per_step: int
    written_by: dict[str, Any]
    files: dict[str, FileMetadata]
    aliases: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:07d}{SUFFIX}"


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint directory. Does not check whether it is valid."""
    return (path / MANIFEST).is_file()


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*{SUFFIX}") if path.is_dir())


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        UserError: If the manifest is missing, damaged, or has another format.
    """
    try:
        values = json.loads((path / MANIFEST).read_text())
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has the format {values['format']}; this release reads {FORMAT}."
            )
        return Manifest(
            **values
            | {"files": {name: FileMetadata(**facts) for name, facts in values["files"].items()}}
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a whole checkpoint: its {MANIFEST} cannot be read ({error})."
        ) from None


def find_damage(path: Path, *, hashes: bool = True) -> str:
    """Describe what is wrong with a checkpoint. Returns an empty string for a valid one.

    Args:
        path: The checkpoint directory.
        hashes: Compare the SHA-256 of every file, not only its size.
    """
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return str(error)
    for name, facts in manifest.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts.bytes:
            return f"{name} has {file.stat().st_size:,} bytes where {facts.bytes:,} were written"
        try:
            if hashes and _sha256(file) != facts.sha256:
                return f"{name} is not what was written: its SHA-256 differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def latest_valid(folder: Path, *, hashes: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint of a run, and messages about newer, damaged ones.

    Args:
        folder: Folder of the run's checkpoints.
        hashes: As in `find_damage`.
    """
    refused = []
    for path in reversed(checkpoints_in(folder)):
        damage = find_damage(path, hashes=hashes)
        if not damage:
            return path, refused
        refused.append(f"{path} is damaged and was passed over: {damage}")
    return None, refused


def read_weights(path: Path) -> dict[str, Any]:
    """Return the state dict of the module: weights by name, and entries that are not tensors.

    Tied weights appear under each of their names.

    Raises:
        UserError: If the checkpoint is damaged or has another format.
    """
    manifest = read_manifest(path)
    weights: dict[str, Any] = dict(_tensors(path, manifest, WEIGHTS))
    weights |= {alias: weights[name] for alias, name in manifest.aliases.items()}
    return weights | read_state(path)["extra"]


def read_optimizer_state(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer state one tensor at a time, with names such as `PARAMETER.exp_avg`."""
    return _tensors(path, read_manifest(path), OPTIMIZER)


def read_state(path: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that is not tensors of the model or the optimizer.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path / STATE} cannot be read: {str(error).splitlines()[0]}") from None


class CheckpointWriter:
    """A checkpoint that is being written, under a temporary name.

    Rank 0 calls `begin`, then every rank calls `write_tensors`, then rank 0 calls `finish`.

    Args:
        path: Final path of the checkpoint.
        rank: Rank of this process.
        ranks: Number of ranks.
    """

    def __init__(self, path: Path, rank: int, ranks: int):
        self.path, self.rank, self.ranks = path, rank, ranks
        self.partial = path.with_name(f".{path.name}.partial")

    def begin(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def write_tensors(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> dict[str, FileMetadata]:
        """Write the tensors of this rank and return the size and hash of each file."""
        facts = {}
        for kind, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments)):
            name = f"{kind}-{self.rank:05d}-of-{self.ranks:05d}.safetensors"
            try:
                save_file(
                    {key: tensor.contiguous() for key, tensor in tensors.items()},
                    self.partial / name,
                )
            except SafetensorError as error:  # it names the system's error in its text only
                raise _as_os_error(error, self.partial / name) from None
            facts[name] = _settle(self.partial / name)
        return facts

    def finish(self, state: Mapping[str, Any], manifest: Manifest) -> None:
        """Write the state and the manifest, then rename the directory to its final name."""
        torch.save(dict(state), self.partial / STATE)
        files = manifest.files | {STATE: _settle(self.partial / STATE)}
        values = asdict(manifest) | {
            "files": {name: asdict(facts) for name, facts in files.items()}
        }
        (self.partial / MANIFEST).write_text(json.dumps(values, indent=1))
        _settle(self.partial / MANIFEST)
        if self.path.exists():  # the run was resumed from before this step and reached it again
            shutil.rmtree(self.path)
        self.partial.rename(self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def point_to(link: Path, target: Path) -> None:
    """Point `last.ckpt` or `best.ckpt` to a checkpoint, if the file system supports links."""
    partial = link.with_name(f".{link.name}.link")
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.name)
        os.replace(partial, link)
    except OSError:
        partial.unlink(missing_ok=True)


def full_disk_message(path: Path, error: OSError) -> str:
    """Return a message that says what could not be written, and what to do."""
    if error.errno in FULL_DISK:
        free = shutil.disk_usage(existing_parent(path)).free / 2**30
        return (
            f"{path} could not be written: {error.strerror} ({free:.1f} GiB free). What was "
            "saved before is whole. Make room, or "
            "lower trainer.keep_checkpoints, and go on with --resume auto."
        )
    return (
        f"{path} could not be written: {error.strerror}. What was saved before is whole; go on "
        "with --resume auto."
    )


def existing_parent(path: Path) -> Path:
    """Return the nearest existing ancestor of `path`, or `path` itself if it exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _tensors(path: Path, manifest: Manifest, kind: str) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(name for name in manifest.files if name.startswith(f"{kind}-")):
        try:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 — safe_open is not a mapping
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / name} cannot be read: {str(error).splitlines()[0]}") from None


def _settle(path: Path) -> FileMetadata:
    """Flush a file to disk and return its size and hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileMetadata(path.stat().st_size, _sha256(path))


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems do not support it
        pass
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    number = next((number for number in FULL_DISK if f"os error {number}" in str(error)), errno.EIO)
    return OSError(number, os.strerror(number), str(path))


MOMENTS, STEP = ("exp_avg", "exp_avg_sq"), "step"


@dataclass
class NamedState:
    """What one rank writes to a checkpoint.

    Attributes:
        weights: This rank's part of the weights, copied to the CPU.
        moments: This rank's part of the optimizer state, copied to the CPU.
        aliases: Maps the other names of a tied weight to the stored one. Same on all ranks.
        extra: Entries of the state dict that are not tensors. Same on all ranks.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class PlainState:
    """Saves and loads a module that every rank holds in full, and its PyTorch optimizer.

    Args:
        module: Its state dict determines what is stored.
        optimizer: AdamW over some of the module's parameters.
    """

    def __init__(self, module: nn.Module, optimizer: Any):
        self.module, self.optimizer = module, optimizer

    def collect(self, rank: int, ranks: int) -> NamedState:
        """Return the part of the state that this rank writes. Must be called on all ranks.

        Args:
            rank: Rank of this process.
            ranks: Number of ranks.
        """
        state, parameters = NamedState(), dict(self.module.named_parameters())
        stored: dict[int, str] = {}
        sizes = 0
        named = self.module.state_dict(keep_vars=True)
        total = max(1, sum(_elements(value) for value in named.values()))
        for name, value in named.items():
            if not isinstance(value, Tensor):
                state.extra[name] = value
            elif id(value) in stored:
                state.aliases[name] = stored[id(value)]
            else:
                stored[id(value)] = name
                # Each tensor is written by exactly one rank, and all write about as much.
                mine = sizes * ranks // total == rank
                sizes += _elements(value)
                self._take(
                    state,
                    name,
                    value,
                    mine,
                    trained=parameters.get(name) is value and value.requires_grad,
                )
        return state

    def fill_weights(self, weights: Mapping[str, Any]) -> None:
        """Load weights into the module.

        Raises:
            UserError: If names or shapes do not match the module's.
        """
        try:
            self.module.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise _unfitting(error) from None

    def fill_optimizer(self, moments: Iterable[tuple[str, Tensor]]) -> None:
        """Load the optimizer state. Parameters without saved state keep what they have.

        Raises:
            UserError: If there is state for a parameter that is not trained.
        """
        names = {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }
        for parameter_name, key, value in _split(moments):
            parameter = names.get(parameter_name)
            if parameter is None:
                raise UserError(
                    f"The checkpoint holds optimiser state of {parameter_name}, which is not "
                    "trained here."
                )
            kept = self.optimizer.state[parameter]
            on_device = value.to(parameter.device)
            kept[key] = on_device.float() if key == STEP else on_device.to(parameter.dtype)

    def _take(
        self, state: NamedState, name: str, value: Tensor, mine: bool, *, trained: bool
    ) -> None:
        if not mine:
            return
        state.weights[name] = value.detach().to("cpu", copy=True)
        if trained:
            for key in (*MOMENTS, STEP):
                if key in (kept := self.optimizer.state.get(value, {})):
                    state.moments[f"{name}.{key}"] = (
                        torch.as_tensor(kept[key]).detach().to("cpu", torch.float32, copy=True)
                    )


class DeepSpeedState(PlainState):
    """Saves and loads a module inside a DeepSpeed engine of any ZeRO stage.

    Args:
        module: Its state dict determines what is stored.
        engine: The engine that owns the module.
        frozen: Weights that are stored but not trained, as they were before the engine rounded
            them to its precision. `fill_weights` updates this dict.
    """

    def __init__(self, module: nn.Module, engine: Any, frozen: dict[str, Tensor]):
        super().__init__(module, engine.optimizer)
        self.frozen = frozen
        # The optimizer that ZeRO wraps; its parameters are flat partitions.
        self.base = engine.optimizer.optimizer
        self.partitioned = engine.zero_optimization_partition_weights()

    def fill_weights(self, weights: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        parameters = dict(self.module.named_parameters())
        expected = {name for name, value in self.module.state_dict(keep_vars=True).items()}
        if expected != weights.keys():
            raise _unfitting(RuntimeError(f"names differ: {sorted(expected ^ weights.keys())[:5]}"))
        for name, module in self.module.named_modules():
            if (key := f"{name}._extra_state") in weights:
                module.set_extra_state(weights[key])
        for name, parameter in parameters.items():
            if name not in weights:  # frozen, and not stored
                continue
            value = weights[name].to(parameter.device)
            if name in self.frozen:
                self.frozen[name] = weights[name].cpu()
            with self._whole(parameter, changed=True):
                if parameter.shape != value.shape:
                    raise _unfitting(
                        RuntimeError(
                            f"{name} is {list(value.shape)}, expected {list(parameter.shape)}"
                        )
                    )
                parameter.data.copy_(value)
            if parameter.requires_grad:
                if self.partitioned:
                    self._set_piece(parameter, value.float(), None)
                else:
                    safe_set_full_fp32_param(parameter, value.float())

    def fill_optimizer(self, moments: Iterable[tuple[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        parameters = dict(self.module.named_parameters())
        collected = list(_split(moments))
        if not collected:
            return
        self._create_moments(steps=max(int(value) for _, key, value in collected if key == STEP))
        for name, key, value in collected:
            if key == STEP:
                continue
            if self.partitioned:
                self._set_piece(parameters[name], value, key)
            else:
                safe_set_full_optimizer_state(
                    parameters[name], value.to(parameters[name].device), key
                )

    def _take(
        self, state: NamedState, name: str, value: Tensor, mine: bool, *, trained: bool
    ) -> None:
        """Gather one parameter, which all ranks must do together; keep it only if `mine`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if name in self.frozen:
            if mine:
                state.weights[name] = self.frozen[name].clone()
            return
        if not trained:
            with self._whole(value):
                if mine:
                    state.weights[name] = value.detach().cpu().clone()
            return
        whole: Any = safe_get_full_fp32_param(value)
        kept = {
            key: safe_get_full_optimizer_state(value, key) for key in MOMENTS if self.base.state
        }
        if mine:
            state.weights[name] = whole.detach().cpu().clone()
            state.moments |= {
                f"{name}.{key}": moment.cpu().clone()
                for key, moment in kept.items()
                if moment is not None
            }
            if kept:
                state.moments[f"{name}.{STEP}"] = torch.tensor(float(self._steps()))

    def collect(self, rank: int, ranks: int) -> NamedState:
        if self.base.state:
            self._link_moments()
        return super().collect(rank, ranks)

    def _link_moments(self) -> None:
        """Link the optimizer state of all groups to the parameters under ZeRO-1 and ZeRO-2.

        DeepSpeed itself links them only once, after the first group has made a step.
        """
        if not self.partitioned:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _steps(self) -> int:
        return max(
            (int(kept[STEP]) for kept in self.base.state.values() if STEP in kept), default=0
        )

    def _create_moments(self, steps: int) -> None:
        """Create the state of every flat partition, as the optimizer does in its first step."""
        for piece in self._pieces():
            torch_step = isinstance(self.base, torch.optim.Optimizer) and type(
                self.base
            ).__module__.startswith("torch.")
            self.base.state[piece] = {
                STEP: torch.tensor(float(steps), device=piece.device) if torch_step else steps,
                **{
                    key: torch.zeros_like(piece, memory_format=torch.preserve_format)
                    for key in MOMENTS
                },
            }
        self._link_moments()

    def _pieces(self) -> Iterator[Tensor]:
        # In this order: ZeRO-1 and ZeRO-2; ZeRO-1 in bfloat16 with float32 gradients; ZeRO-3.
        names = (
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
            "fp32_partitioned_groups_flat",
        )
        yield from next(
            getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name)
        )

    def _set_piece(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Set this rank's partition of a parameter under ZeRO-3. The last rank's is padded."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        length = parameter.ds_tensor.ds_numel
        start = length * torch.distributed.get_rank()
        flat = value.flatten()[start : start + length].to(parameter.device)
        piece = flat.new_zeros(length)
        piece[: len(flat)] = flat
        if key is None:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, key)

    def _whole(self, parameter: Tensor, *, changed: bool = False) -> Any:
        """Return a context in which every rank has the full parameter.

        With `changed`, all ranks receive what rank 0 writes into it.
        """
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if changed else None, enabled=hasattr(parameter, "ds_id")
        )


def _elements(value: Any) -> int:
    """Return the number of elements of a tensor, including those that ZeRO-3 has partitioned."""
    return getattr(value, "ds_numel", value.numel()) if isinstance(value, Tensor) else 0


def _split(moments: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str, Tensor]]:
    for name, value in moments:
        parameter, _, key = name.rpartition(".")
        yield parameter, key, value


def _unfitting(error: Exception) -> UserError:
    return UserError(
        f"The checkpoint is of another model than this config describes: {str(error)[:600]}\n"
        "Resume with the config that stands in its run directory."
    )
