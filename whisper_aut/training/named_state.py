"""Weights and Adam moments by parameter name, out of a module and its optimiser and back, under every strategy.

In: a LightningModule and its optimiser, plain or inside DeepSpeed. Out: this rank's share of the named tensors. Next:
`training.checkpoint` writes them. DeepSpeed keeps float32 weights and moments in flat pieces over the ranks; its public functions put one
parameter together at a time, so no rank ever holds more than its share. That is what makes a checkpoint of one strategy and number of
ranks the checkpoint of any other.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from whisper_aut.errors import UserError

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
