"""Checkpoints as directories of named tensors, independent of the strategy and number of ranks.

A directory `step-0000100.ckpt/` contains `weights-*.safetensors`, `optimizer-*.safetensors`, with
`optim.ema_decay` also `average-*.safetensors`, `state.pt` and `manifest.json`. It is written under
a temporary name and renamed once the files of all ranks are on disk, so a directory with the final
name is complete. The manifest records the size and SHA-256 of every file, which reveals later
damage. Nothing is unpickled: tensors are stored as safetensors, and `torch.load(weights_only=True)`
reads the rest.

`ModelState` and `DeepSpeedState` collect the tensors of a model and load them back, on any number
of ranks. One tensor at a time is gathered from the ranks, so none needs memory for the whole model.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from whisper_aut.errors import UserError
from whisper_aut.utils import file_sha256, parse_json

SUFFIX, PREFIX = ".ckpt", "step-"
LAST, BEST = f"last{SUFFIX}", f"best{SUFFIX}"
MANIFEST, STATE = "manifest.json", "state.pt"
WEIGHTS, OPTIMIZER, AVERAGE = "weights", "optimizer", "average"
FORMAT = 2
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MOMENTS, STEP = ("exp_avg", "exp_avg_sq"), "step"  # AdamW's state of a parameter
MOMENT_BYTES = 8  # of a trained parameter, two float32 values


class FileMetadata(NamedTuple):
    """Size and hash of a file at the time it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint.

    `clips_per_step` counts all ranks and micro-batches; it is 0 if steps are measured in seconds of
    audio. A run can only be resumed with the same number. `files` are all but the manifest itself.
    `aliases` map the other names of a tied weight to the name it is stored under.
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
        values = parse_json((path / MANIFEST).read_text())
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has format {values['format']}, but this release reads format {FORMAT}."
            )
        files = {name: FileMetadata(*entry) for name, entry in values["files"].items()}
        return Manifest(**values | {"files": files})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint: {MANIFEST} cannot be read ({error})."
        ) from None


def find_damage(path: Path, *, hashes: bool = True) -> str:
    """Describe what is wrong with a checkpoint. Returns an empty string for a valid one.

    Without `hashes`, only the sizes of files are compared.
    """
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return str(error)
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected.bytes:
            return f"{name} has {file.stat().st_size:,} bytes instead of {expected.bytes:,}"
        try:
            if hashes and file_sha256(file) != expected.sha256:
                return f"{name} has changed since it was written: its SHA-256 differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def latest_valid(folder: Path, warn: Callable[[str], None], *, hashes: bool = True) -> Path | None:
    """Return the newest valid checkpoint in a folder, or None if there are no checkpoints.

    Calls `warn` with a message for each damaged checkpoint that is skipped.

    Raises:
        UserError: If all checkpoints are damaged.
    """
    found = checkpoints_in(folder)
    for path in reversed(found):
        damage = find_damage(path, hashes=hashes)
        if not damage:
            return path.resolve()
        warn(f"{path} is damaged and was skipped: {damage}")
    if found:
        raise UserError(f"{folder} contains no valid checkpoint.")
    return None


def read_weights(path: Path, *, averaged: bool = False) -> dict[str, Any]:
    """Return the state dict of the module: weights by name, and entries that are not tensors.

    Tied weights appear under each of their names. With `averaged`, trained weights are replaced by
    their moving average, if the run has one.
    """
    manifest = read_manifest(path)
    weights: dict[str, Any] = dict(_tensors(path, manifest, WEIGHTS))
    weights |= dict(_tensors(path, manifest, AVERAGE)) if averaged else {}
    weights |= {alias: weights[name] for alias, name in manifest.aliases.items()}
    return weights | read_state(path)["extra"]


def read_optimizer_state(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer state one tensor at a time, with names such as `PARAMETER.exp_avg`."""
    return _tensors(path, read_manifest(path), OPTIMIZER)


def read_state(path: Path) -> dict[str, Any]:
    """Return the state of Lightning's loops, callbacks and schedulers."""
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path / STATE} cannot be read: {str(error).splitlines()[0]}") from None


@dataclass
class StateShard:
    """What one rank writes: its part of the weights, their average and the optimizer state, copied
    to the CPU.

    `aliases` (see `Manifest`) and `extra`, the entries of the state dict that are not tensors, are
    the same on all ranks.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class CheckpointWriter:
    """Writes a checkpoint under a temporary name.

    Rank 0 calls `begin`, then every rank calls `write_tensors`, then rank 0 calls `finish`.
    """

    def __init__(self, path: Path, rank: int, ranks: int):
        self.path, self.rank, self.ranks = path, rank, ranks
        self.partial = path.with_name(f".{path.name}.partial")

    def begin(self) -> None:
        self.discard()
        self.partial.mkdir(parents=True)

    def write_tensors(self, shard: StateShard) -> dict[str, FileMetadata]:
        """Write the tensors of this rank and return the size and hash of each file."""
        written, kinds = {}, {WEIGHTS: shard.weights, OPTIMIZER: shard.optimizer_state}
        for kind, tensors in (kinds | ({AVERAGE: shard.average} if shard.average else {})).items():
            name = f"{kind}-{self.rank:05d}-of-{self.ranks:05d}.safetensors"
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            try:
                save_file(contiguous, self.partial / name)
            except SafetensorError as error:  # it names the system's error only in its text
                numbers = (n for n in FULL_DISK if f"os error {n}" in str(error))
                number = next(numbers, errno.EIO)
                raise OSError(number, os.strerror(number), str(self.partial / name)) from None
            written[name] = _flush(self.partial / name)
        return written

    def finish(self, state: Mapping[str, Any], manifest: Manifest) -> None:
        """Write the state and the manifest, then rename the directory to its final name."""
        torch.save(dict(state), self.partial / STATE)
        values = asdict(manifest)
        values["files"] |= {STATE: _flush(self.partial / STATE)}
        (self.partial / MANIFEST).write_text(json.dumps(values, indent=1))
        _flush(self.partial / MANIFEST)
        if self.path.exists():  # the run was resumed from before this step and reached it again
            shutil.rmtree(self.path)
        self.partial.rename(self.path)
        _flush_folder(self.path.parent)

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def point_link(link: Path, target: Path) -> None:
    """Point a link to its sibling `target`, atomically. Without links, do nothing."""
    partial = link.with_name(f".{link.name}-{os.getpid()}")
    try:
        partial.symlink_to(target.name)
        os.replace(partial, link)
    except OSError:  # the file system does not support links
        partial.unlink(missing_ok=True)


def checkpoint_bytes(module: nn.Module) -> int:
    """Return the approximate size of a checkpoint: the state dict and the optimizer state."""
    tensors = {
        id(value): value.nbytes
        for value in module.state_dict(keep_vars=True).values()
        if isinstance(value, Tensor)
    }
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    average = sum(tensor.nbytes for tensor in getattr(module, "average", {}).values())
    return sum(tensors.values()) + average + MOMENT_BYTES * trained


def check_disk_space(folder: Path, one_checkpoint: int, kept: int) -> str:
    """Check that a folder is writable and has room for checkpoints.

    The folder need not exist. `one_checkpoint` is the size of a checkpoint in bytes, and `kept` the
    number of checkpoints that are kept. Returns a warning if the disk may fill up later, else "".

    Raises:
        UserError: If the folder is not writable, or two checkpoints do not fit.
    """
    path = existing_parent(folder)
    try:
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"Cannot write to {path}: {error.strerror}. Set runs=FOLDER to write elsewhere."
        ) from None
    free, size = shutil.disk_usage(path).free, one_checkpoint / 2**30
    if free < 2 * one_checkpoint:
        raise UserError(
            f"{path} has {free / 2**30:.1f} GiB free, and a checkpoint takes about {size:.1f} GiB. "
            "Space for two is needed, because the previous one is deleted only when the next is "
            "complete. Free some space, or set runs=FOLDER to write elsewhere."
        )
    if free < (kept + 1) * one_checkpoint:
        return (
            f"{path} has {free / 2**30:.1f} GiB free, but the run may need space for {kept + 1} "
            f"checkpoints of {size:.1f} GiB: lower trainer.keep_checkpoints or free some space."
        )
    return ""


def write_error_message(path: Path, error: OSError) -> str:
    """Return a message that says what could not be written, and what to do."""
    space, advice = "", "Continue"
    if error.errno in FULL_DISK:
        space = f" ({shutil.disk_usage(existing_parent(path)).free / 2**30:.1f} GiB free)"
        advice = "Free some space or lower trainer.keep_checkpoints, then continue"
    return (
        f"{path} could not be written: {error.strerror}{space}. Earlier checkpoints are intact. "
        f"{advice} with --resume auto."
    )


def existing_parent(path: Path) -> Path:
    """Return the nearest existing ancestor of `path`, or `path` itself if it exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


class ModelState:
    """Saves and loads a module and its AdamW optimizer.

    Every rank holds the module in full, or as the `DTensor`s of FSDP.
    """

    def __init__(self, module: nn.Module, optimizer: Any):
        self.module, self.optimizer = module, optimizer

    def collect(self, rank: int, ranks: int) -> StateShard:
        """Return the part of the state that this rank writes. Must be called on all ranks."""
        shard, parameters = StateShard(), dict(self.module.named_parameters())
        stored: dict[int, str] = {}
        state_dict = self.module.state_dict(keep_vars=True)
        total, before = max(1, sum(map(_numel, state_dict.values()))), 0
        for name, value in state_dict.items():
            if not isinstance(value, Tensor):
                shard.extra[name] = value
            elif id(value) in stored:
                shard.aliases[name] = stored[id(value)]
            else:
                stored[id(value)] = name
                trained = parameters.get(name) is value and value.requires_grad
                weight, optimizer_state = self._full_tensors(name, value, trained)
                average = getattr(self.module, "average", {}).get(name)
                average = None if average is None else full_tensor(average)
                # Each tensor is written by exactly one rank, and all write about as much.
                if before * ranks // total == rank:
                    shard.weights[name] = weight.detach().to("cpu", copy=True)
                    for key, tensor in optimizer_state.items():
                        copied = tensor.detach().to("cpu", torch.float32, copy=True)
                        shard.optimizer_state[f"{name}.{key}"] = copied
                    if average is not None:
                        shard.average[name] = average.to("cpu", copy=True)
                before += _numel(value)
        return shard

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Load a state dict into the module.

        Raises:
            UserError: If names or shapes do not match the module's.
        """
        named = self.module.state_dict(keep_vars=True)
        weights = {name: shard_like(value, named.get(name)) for name, value in weights.items()}
        try:
            self.module.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise _other_model(str(error)) from None

    def load_optimizer_state(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load the optimizer state. Parameters without saved state keep what they have.

        Raises:
            UserError: If there is state for a parameter that is not trained.
        """
        for parameter, key, value in self._by_parameter(tensors):
            dtype = torch.float32 if key == STEP else parameter.dtype
            on_device = value.to(parameter.device, dtype)
            self.optimizer.state[parameter][key] = shard_like(on_device, parameter)

    def _full_tensors(
        self, name: str, value: Tensor, trained: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a weight and its optimizer state. Must be called on all ranks."""
        state = self.optimizer.state.get(value, {}) if trained else {}
        kept = {key: torch.as_tensor(state[key]) for key in (*MOMENTS, STEP) if key in state}
        return full_tensor(value), {key: full_tensor(tensor) for key, tensor in kept.items()}

    def _by_parameter(
        self, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
        trained = {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }
        for name, value in tensors:
            parameter_name, _, key = name.rpartition(".")
            if parameter_name not in trained:
                raise UserError(
                    f"The checkpoint contains optimizer state of {parameter_name}, which this "
                    "config does not train. Resume with the config in its run directory."
                )
            yield trained[parameter_name], key, value


class DeepSpeedState(ModelState):
    """Saves and loads a module inside a DeepSpeed engine of any ZeRO stage.

    DeepSpeed's own checkpoints are pickles for one ZeRO stage and number of ranks
    (https://github.com/deepspeedai/DeepSpeed/issues/3810). Its universal checkpoints
    (https://github.com/deepspeedai/DeepSpeed/issues/2921) are pickles too, and a separate command
    has to convert them.

    Args:
        module: Its state dict determines what is stored.
        engine: The engine that owns the module.
        frozen: Weights that are stored but not trained, as they were before the engine rounded them
            to its precision. `load_weights` updates this dict.
    """

    def __init__(self, module: nn.Module, engine: Any, frozen: dict[str, Tensor]):
        super().__init__(module, engine.optimizer)
        self.frozen = frozen
        # The optimizer that ZeRO wraps; its parameters are flat partitions.
        self.base = engine.optimizer.optimizer
        self.partitioned = engine.zero_optimization_partition_weights()

    def collect(self, rank: int, ranks: int) -> StateShard:
        if self.base.state:
            self._link_optimizer_state()
        return super().collect(rank, ranks)

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        if differing := self.module.state_dict(keep_vars=True).keys() ^ weights.keys():
            raise _other_model(f"names differ: {sorted(differing)[:5]}")
        for name, module in self.module.named_modules():
            if (key := f"{name}._extra_state") in weights:
                module.set_extra_state(weights[key])
        for name, parameter in self.module.named_parameters():
            if name not in weights:  # frozen, and not stored
                continue
            value = weights[name].to(parameter.device)
            if name in self.frozen:
                self.frozen[name] = weights[name].cpu()
            # All ranks receive what rank 0 writes into the gathered parameter.
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")
            ):
                if parameter.shape != value.shape:
                    shapes = f"{list(value.shape)}, expected {list(parameter.shape)}"
                    raise _other_model(f"{name} has shape {shapes}")
                parameter.data.copy_(value)
            if parameter.requires_grad and self.partitioned:
                self._set_partition(parameter, value.float(), None)
            elif parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value.float())

    def load_optimizer_state(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        steps = None
        for parameter, key, value in self._by_parameter(tensors):  # one tensor in memory at a time
            if steps is None:
                steps = 0
                self._create_optimizer_state()
            if key == STEP:
                steps = max(steps, int(value))
            elif self.partitioned:
                self._set_partition(parameter, value, key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        for state in self.base.state.values() if steps else ():
            state[STEP] = state[STEP].fill_(steps) if isinstance(state[STEP], Tensor) else steps

    def _full_tensors(
        self, name: str, value: Tensor, trained: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `ModelState`, but gathered from the partitions of all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not trained:  # a frozen weight, or a buffer, which ZeRO does not partition
            return self.frozen.get(name, value), {}
        weight: Any = safe_get_full_fp32_param(value)
        if not self.base.state:
            return weight, {}
        moments = {key: safe_get_full_optimizer_state(value, key) for key in MOMENTS}
        state = {key: moment for key, moment in moments.items() if moment is not None}
        steps = [int(kept[STEP]) for kept in self.base.state.values() if STEP in kept]
        return weight, {**state, STEP: torch.tensor(float(max(steps, default=0)))}

    def _link_optimizer_state(self) -> None:
        """Link the optimizer state of all groups to the parameters under ZeRO-1 and ZeRO-2.

        `_lazy_init_hp_params_optimizer_state` in `deepspeed/runtime/zero/stage_1_and_2.py` links
        them only once, after the first group has made a step.
        """
        if not self.partitioned:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _create_optimizer_state(self) -> None:
        """Create the state of every flat partition, as the optimizer does in its first step."""
        is_torch = type(self.base).__module__.startswith("torch.")
        for partition in self._partitions():
            moments = {
                key: torch.zeros_like(partition, memory_format=torch.preserve_format)
                for key in MOMENTS
            }
            step = torch.zeros((), device=partition.device) if is_torch else 0
            self.base.state[partition] = {STEP: step, **moments}
        self._link_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        # In this order: ZeRO-1 and ZeRO-2; ZeRO-1 in bfloat16 with float32 gradients; ZeRO-3.
        names = (
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
            "fp32_partitioned_groups_flat",
        )
        return next(
            getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name)
        )

    def _set_partition(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Set this rank's partition of a parameter under ZeRO-3. The last rank's is padded.

        `set_full_hp_param` in `deepspeed/runtime/zero/stage3.py` takes the full tensor, but fails
        for a padded partition.
        """
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        length = parameter.ds_tensor.ds_numel
        start = length * torch.distributed.get_rank()
        values = value.flatten()[start : start + length].to(parameter.device)
        partition = values.new_zeros(length)
        partition[: len(values)] = values
        if key is None:
            safe_set_local_fp32_param(parameter, partition)
        else:
            safe_set_local_optimizer_state(parameter, partition, key)


def full_tensor(value: Tensor) -> Tensor:
    """Gather a tensor if FSDP has sharded it. Must be called on all ranks."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_tensor(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor, if FSDP has sharded it."""
    return value.to_local() if isinstance(value, DTensor) else value


def shard_like(value: Any, parameter: Any) -> Any:
    """Return this rank's part of a full tensor, if FSDP has sharded the parameter."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every rank has read the same tensor, so none needs to send it.
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def _numel(value: Any) -> int:
    """Return the number of elements of a tensor, including those that ZeRO-3 has partitioned."""
    return getattr(value, "ds_numel", value.numel()) if isinstance(value, Tensor) else 0


def _other_model(difference: str) -> UserError:
    return UserError(
        f"The checkpoint belongs to a different model than this config describes: "
        f"{difference[:600]}\nResume with the config in its run directory."
    )


def _tensors(path: Path, manifest: Manifest, kind: str) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(name for name in manifest.files if name.startswith(f"{kind}-")):
        try:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 — safe_open is not a mapping
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / name} cannot be read: {str(error).splitlines()[0]}") from None


def _flush(path: Path) -> FileMetadata:
    """Flush a file to disk and return its size and hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileMetadata(path.stat().st_size, file_sha256(path))


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems do not support it
        pass
    finally:
        os.close(handle)
