"""One word of the config → a Lightning strategy.

In: a name such as `deepspeed_stage_2`. Out: what `Trainer(strategy=…)` takes. Next: `training.train`. DeepSpeed also runs on CPU
ranks over gloo, by a small subclass, so that the real engine is tested where there is no GPU.
"""

from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy

from whisper_aut.errors import UserError

OFFLOAD = "_offload"
DEEPSPEED = "deepspeed_stage_"


def build_strategy(name: str, *, timeout_minutes: float, ranks: int) -> Strategy | str:
    """Return the strategy that a config names.

    Args:
        name: `auto`, `ddp`, or `deepspeed_stage_1|2|3`, the latter two also with `_offload`.
        timeout_minutes: how long a rank waits for the others before the job ends.
        ranks: of the whole job.

    Raises:
        UserError: offloading without a GPU.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if name.startswith(DEEPSPEED):
        offload = name.endswith(OFFLOAD)
        if offload and not torch.cuda.is_available():
            raise UserError(f"strategy.name={name} moves optimiser state from the GPU to the CPU, and there is no GPU here.")
        stage = int(name.removeprefix(DEEPSPEED).removesuffix(OFFLOAD))
        kind = DeepSpeedStrategy if torch.cuda.is_available() else _CPUDeepSpeedStrategy
        return kind(stage=stage, offload_optimizer=offload, timeout=timeout)
    if name == "ddp" or (name == "auto" and ranks > 1):
        return DDPStrategy(timeout=timeout)
    return "auto"


class _CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed's engine on CPU ranks: Lightning's checks for CUDA devices are left out, the rest is its own."""

    def __init__(self, **options: Any):
        super().__init__(process_group_backend="gloo", **options)

    def setup_environment(self) -> None:
        # Past DeepSpeedStrategy's own method, which does nothing but insist on CUDA.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        # DeepSpeed asks for the device's index, which plain "cpu" lacks.
        return torch.device("cpu", 0)
