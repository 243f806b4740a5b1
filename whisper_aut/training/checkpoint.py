"""A checkpoint on disk: a directory of tensors by name, whatever strategy wrote it and on however many ranks.

In: each rank's share of weights and Adam moments, and the state of loops, schedules and loader. Out: `step-0000100.ckpt/` with
`weights-*.safetensors`, `optimizer-*.safetensors`, `state.pt` and `manifest.json`. Next: `training.named_state` puts tensors back where
they belong, on another number of ranks as well; `export` reads the weights alone.

A directory is written under another name and renamed when every rank's files are on the disk, so one that has its name is whole. The
manifest, written last, holds the size and SHA-256 of every file; damage that comes later is found by it. Nothing is unpickled: tensors
lie in safetensors, the rest is read by `torch.load(weights_only=True)`.
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
class FileFacts:
    """What a file was when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What stands in a checkpoint.

    Attributes:
        step: optimiser steps done.
        clips_per_step: clips of an optimiser step over all ranks and micro-batches; another number is another training.
        written_by: strategy, ranks, precision; for people.
        files: every file but the manifest itself.
        aliases: names of tied weights → the name under which the tensor is stored.
    """

    step: int
    clips_per_step: int
    written_by: dict[str, Any]
    files: dict[str, FileFacts]
    aliases: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:07d}{SUFFIX}"


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that carry their final name, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*{SUFFIX}") if path.is_dir())


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        UserError: missing, damaged, or of another format.
    """
    try:
        values = json.loads((path / MANIFEST).read_text())
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has the format {values['format']}; this release reads {FORMAT}."
            )
        return Manifest(
            **values
            | {"files": {name: FileFacts(**facts) for name, facts in values["files"].items()}}
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a whole checkpoint: its {MANIFEST} cannot be read ({error})."
        ) from None


def damage_of(path: Path, *, hashes: bool = True) -> str:
    """Say what is wrong with a checkpoint; an empty string where nothing is.

    Args:
        hashes: compare contents too, and not sizes alone.
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


def newest_sound(folder: Path, *, hashes: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint of a run that is as it was written, and a line on each newer one that is not."""
    refused = []
    for path in reversed(checkpoints_in(folder)):
        damage = damage_of(path, hashes=hashes)
        if not damage:
            return path, refused
        refused.append(f"{path} is damaged and was passed over: {damage}")
    return None, refused


def read_weights(path: Path) -> dict[str, Any]:
    """Return all weights by name, tied ones under each of theirs, and what modules keep that is no tensor.

    Raises:
        UserError: damaged, or of another format.
    """
    manifest = read_manifest(path)
    weights: dict[str, Any] = dict(_tensors(path, manifest, WEIGHTS))
    weights |= {alias: weights[name] for alias, name in manifest.aliases.items()}
    return weights | read_state(path)["extra"]


def read_moments(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimiser's state by `PARAMETER.exp_avg` and the like, tensor after tensor."""
    return _tensors(path, read_manifest(path), OPTIMIZER)


def read_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside its tensors.

    Raises:
        UserError: damaged.
    """
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path / STATE} cannot be read: {str(error).splitlines()[0]}") from None


class CheckpointDraft:
    """A checkpoint that is being written, under a name that nobody takes for a checkpoint.

    The first rank calls `begin`, then each rank `write_tensors` with its share, then the first rank `finish`.

    Args:
        path: its final place.
        rank, ranks: of this process.
    """

    def __init__(self, path: Path, rank: int, ranks: int):
        self.path, self.rank, self.ranks = path, rank, ranks
        self.partial = path.with_name(f".{path.name}.partial")

    def begin(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def write_tensors(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> dict[str, FileFacts]:
        """Write this rank's share; return what was written."""
        facts = {}
        for kind, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments)):
            name = f"{kind}-{self.rank:05d}-of-{self.ranks:05d}.safetensors"
            try:
                save_file(
                    {key: tensor.contiguous() for key, tensor in tensors.items()},
                    self.partial / name,
                )
            except SafetensorError as error:  # wraps what the system said, in words alone
                raise _as_os_error(error, self.partial / name) from None
            facts[name] = _settle(self.partial / name)
        return facts

    def finish(self, state: Mapping[str, Any], manifest: Manifest) -> None:
        """Add what is not tensors, then give the directory its name."""
        torch.save(dict(state), self.partial / STATE)
        files = manifest.files | {STATE: _settle(self.partial / STATE)}
        values = asdict(manifest) | {
            "files": {name: asdict(facts) for name, facts in files.items()}
        }
        (self.partial / MANIFEST).write_text(json.dumps(values, indent=1))
        _settle(self.partial / MANIFEST)
        if self.path.exists():  # the same step again, after a resume behind it
            shutil.rmtree(self.path)
        self.partial.rename(self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def point_to(link: Path, target: Path) -> None:
    """Let `last.ckpt` or `best.ckpt` name a checkpoint, where the file system has links."""
    partial = link.with_name(f".{link.name}.link")
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.name)
        os.replace(partial, link)
    except OSError:
        partial.unlink(missing_ok=True)


def full_disk_message(path: Path, error: OSError) -> str:
    """Say that something could not be written, and what to do."""
    if error.errno in FULL_DISK:
        free = shutil.disk_usage(existing_parent(path)).free / 2**30
        return (
            f"{path} could not be written: {error.strerror} ({free:.1f} GiB free). What was saved before is whole. Make room, or "
            "lower trainer.keep_checkpoints, and go on with --resume auto."
        )
    return f"{path} could not be written: {error.strerror}. What was saved before is whole; go on with --resume auto."


def existing_parent(path: Path) -> Path:
    """Return the nearest folder on the way to `path` that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _tensors(path: Path, manifest: Manifest, kind: str) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(name for name in manifest.files if name.startswith(f"{kind}-")):
        try:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 — safe_open is no mapping
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / name} cannot be read: {str(error).splitlines()[0]}") from None


def _settle(path: Path) -> FileFacts:
    """Bring a file to the disk and return what it is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileFacts(path.stat().st_size, _sha256(path))


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse it
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
    """What one rank writes.

    Attributes:
        weights, moments: its share of the tensors, copies on the CPU that training does not change.
        aliases: names of tied weights → the name that is stored; the same on all ranks.
        extra: entries of the module's state that are no tensors; the same on all ranks.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class PlainState:
    """Reads and fills a module whose parameters are whole on every rank, and a PyTorch optimiser.

    Args:
        module: its state dict decides what is stored.
        optimizer: AdamW over some of its parameters.
    """

    def __init__(self, module: nn.Module, optimizer: Any):
        self.module, self.optimizer = module, optimizer

    def collect(self, rank: int, ranks: int) -> NamedState:
        """Return this rank's share. All ranks call it together."""
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
                mine = (
                    sizes * ranks // total == rank
                )  # equal shares, and no two ranks the same tensor
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
        """Put weights back, every name matched.

        Raises:
            UserError: names or shapes are not this module's.
        """
        try:
            self.module.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise _unfitting(error) from None

    def fill_moments(self, moments: Iterable[tuple[str, Tensor]]) -> None:
        """Put the optimiser's state back; parameters without any stay as they are."""
        names = {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }
        for parameter_name, key, value in _split(moments):
            parameter = names.get(parameter_name)
            if parameter is None:
                raise UserError(
                    f"The checkpoint holds optimiser state of {parameter_name}, which is not trained here."
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
    """Reads and fills a module inside a DeepSpeed engine of any ZeRO stage.

    Args:
        module: as above.
        engine: the engine that holds it.
        frozen: what is stored but not trained, as it was before the engine rounded it to its
            precision; brought up to date with the weights that are filled in.
    """

    def __init__(self, module: nn.Module, engine: Any, frozen: dict[str, Tensor]):
        super().__init__(module, engine.optimizer)
        self.frozen = frozen
        self.base = engine.optimizer.optimizer  # the PyTorch optimiser over the flat pieces
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

    def fill_moments(self, moments: Iterable[tuple[str, Tensor]]) -> None:
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
        """Put one parameter together, on all ranks at once; keep it where it is this rank's."""
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
        """Let the stages 1 and 2 know the moments of all groups: by itself DeepSpeed does so when the first one has made a step."""
        if not self.partitioned:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _steps(self) -> int:
        return max(
            (int(kept[STEP]) for kept in self.base.state.values() if STEP in kept), default=0
        )

    def _create_moments(self, steps: int) -> None:
        """Give every flat piece the state that the optimiser would have made in its first step."""
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
        # Stages 1 and 2; stage 1 in bfloat16 with float32 gradients; stage 3.
        names = (
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
            "fp32_partitioned_groups_flat",
        )
        yield from next(
            getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name)
        )

    def _set_piece(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Set this rank's piece of a parameter under ZeRO-3. The last rank's is padded."""
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
        """A context in which a parameter is whole on every rank; what the first rank writes into it holds where it is `changed`."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if changed else None, enabled=hasattr(parameter, "ds_id")
        )


def _elements(value: Any) -> int:
    """Return a tensor's elements, also where ZeRO-3 has left a shell of it."""
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
