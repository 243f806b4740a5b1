"""What a planned run needs and how long it takes on which hardware, in tables.

Memory and FLOPs are counted (`training.plan`). Times follow from them and from the fractions of a
device's data sheet that are assumed below: they are estimates, not measurements.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from rich.table import Table
from rich.text import Text

from whisper_aut.training.accelerators import ACCELERATORS, Accelerator
from whisper_aut.training.plan import (
    GIBIBYTE,
    STAGES,
    UPDATE_BYTES,
    DeviceMemory,
    StepCost,
    device_memory,
)

PRODUCT_EFFICIENCY = 0.6  # of the peak that matrix products reach
MEMORY_EFFICIENCY = 0.8  # of the bandwidth that all other kernels reach
LAUNCH_SECONDS = 10e-6  # of one kernel without compilation; small models wait for launches
RESERVED_GIB = 2.0  # CUDA's context, cuBLAS, communication buffers, gaps between blocks
# FLAC → log-mel on one core: decoding at 3,800 and features at 5,000 one after the other.
CORE_AUDIO_SECONDS = 2_000
FLAC_BYTES_PER_SECOND = 19_000  # of 16 kHz mono, where no index tells the shards' own


@dataclass(frozen=True)
class Forecast:
    """A planned run.

    Attributes:
        cost_of: (model in bfloat16, gradient checkpointing) → the cost of a micro-batch.
        ranks: devices of the whole run.
        stage: the configured ZeRO stage, 0 for none.
        offload: optimiser state in host memory.
        precision: Lightning's; 16 bits mean autocast, and under DeepSpeed a model in bfloat16.
        checkpointing: as configured.
        micro_batches: per optimiser step.
        steps: of the run; None where neither the config nor the shards say.
        step_audio_seconds: on one device in one optimiser step.
        bytes_per_audio_second: of the shards.
        assumptions: what the config did not say.
    """

    cost_of: Callable[[bool, bool], StepCost]
    ranks: int
    stage: int
    offload: bool
    precision: str
    checkpointing: bool
    micro_batches: int
    steps: int | None
    step_audio_seconds: float
    bytes_per_audio_second: float
    assumptions: tuple[str, ...] = ()

    @property
    def cost(self) -> StepCost:
        """The cost of a micro-batch as the run is configured."""
        return self.cost_of(self._half_weights(self.stage), self.checkpointing)

    def memory(self, stage: int, checkpointing: bool) -> DeviceMemory:
        half = self._half_weights(stage)
        return device_memory(
            self.cost_of(half, checkpointing),
            stage=stage,
            ranks=self.ranks,
            half_weights=half,
            offload=self.offload and stage > 0,
            accumulates=self.micro_batches > 1,
        )

    def step_seconds(self, device: Accelerator) -> float:
        """Return an estimate of an optimiser step, without communication between ranks."""
        cost, moved = self.cost, MEMORY_EFFICIENCY * 1e12 * device.terabytes_per_second
        kernels = cost.seconds(PRODUCT_EFFICIENCY * device.peak_flops(self.precision), moved)
        updated = cost.trainable / (self.ranks if self.stage else 1)
        update = 0.0 if self.offload else updated * UPDATE_BYTES / moved
        return self.micro_batches * max(kernels, cost.launches * LAUNCH_SECONDS) + update

    def utilisation(self, device: Accelerator) -> tuple[float, float]:
        """Return the fractions of the device's peak that are useful (MFU) and computed at all."""
        peak = self.step_seconds(device) * device.peak_flops(self.precision) / self.micro_batches
        return self.cost.model_flops / peak, self.cost.flops / peak

    def fits(self, device: Accelerator, memory: DeviceMemory) -> bool:
        return memory.total / GIBIBYTE + RESERVED_GIB <= device.memory_gib

    def what_fits(self, device: Accelerator) -> str:
        """Return the least measure that makes the run fit: checkpointing, then higher stages."""
        if self.fits(device, self.memory(self.stage, self.checkpointing)):
            return "fits as it is"
        for stage in range(self.stage, len(STAGES) if self.ranks > 1 else self.stage + 1):
            for checkpointing, extra in ((False, ""), (True, " + gradient checkpointing")):
                if self.fits(device, self.memory(stage, checkpointing)):
                    return STAGES[stage] + extra
        return "too large: lower data.batch_clips" + ("" if self.ranks > 1 else " or add devices")

    def _half_weights(self, stage: int) -> bool:
        return stage > 0 and not self.precision.startswith("32")


def tables(plan: Forecast) -> Iterator[Table | str]:
    """Yield the plan for the console, part by part."""
    cost = plan.cost
    millions = (f"{count / 1e6:,.1f} M" for count in (cost.encoder, cost.decoder, cost.trainable))
    yield "Parameters: encoder {}, decoder {}, trainable {}".format(*millions)
    useful, computed = (
        f"{flops * plan.micro_batches / 1e12:,.3g}" for flops in (cost.model_flops, cost.flops)
    )
    yield (
        f"A step: {useful} useful of {computed} TFLOP per device in "
        f"{cost.launches * plan.micro_batches:,} kernels, {plan.step_audio_seconds:,.0f} "
        f"audio-seconds per device on {plan.ranks} device{'s' * (plan.ranks > 1)}, "
        f"{plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)}"
        + (f"; {plan.steps:,} steps" if plan.steps else "; the number of steps is not known")
    )
    yield _memory_table(plan)
    yield _device_table(plan)
    yield (
        f"Times are estimates: matrix products at {PRODUCT_EFFICIENCY:.0%} of the peak, other "
        f"kernels at {MEMORY_EFFICIENCY:.0%} of the memory bandwidth, "
        f"{1e6 * LAUNCH_SECONDS:.0f} µs a launch; communication, validation and checkpoints are "
        "not counted. MFU counts useful FLOPs, utilisation those that are computed again too."
    )
    yield from (f"Assumed: {assumption}" for assumption in plan.assumptions)


def _memory_table(plan: Forecast) -> Table:
    table = Table(
        title=f"GiB per device over {plan.ranks}, at the worst moment of a step",
        title_justify="left",
    )
    for column in (
        "",
        "weights",
        "gradients",
        "optimiser",
        "activations",
        "total",
        "with checkpointing",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for stage, name in enumerate(STAGES):
        memory = plan.memory(stage, checkpointing=False)
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.total,
        )
        lean = plan.memory(stage, checkpointing=True).total
        marked = Text(name, style="bold" if stage == plan.stage else "")
        table.add_row(marked, *(f"{part / GIBIBYTE:.2f}" for part in (*parts, lean)))
    return table


def _device_table(plan: Forecast) -> Table:
    table = Table(
        title=f"On {plan.ranks} of these",
        title_justify="left",
    )
    for column in (
        "device",
        "what fits",
        "step",
        "MFU",
        "utilisation",
        "whole run",
        "audio-s/s",
        "cores for data",
        "reads MB/s",
    ):
        table.add_column(column, justify="left" if column in ("device", "what fits") else "right")
    for device in ACCELERATORS:
        seconds = plan.step_seconds(device)
        audio = plan.ranks * plan.step_audio_seconds / seconds
        run = str(timedelta(seconds=round(seconds * plan.steps))) if plan.steps else "?"
        table.add_row(
            device.name,
            plan.what_fits(device),
            f"{seconds:.3g} s",
            *(f"{fraction:.0%}" for fraction in plan.utilisation(device)),
            run,
            f"{audio:,.0f}",
            f"{max(1, -(-audio // CORE_AUDIO_SECONDS)):,.0f}",
            f"{audio * plan.bytes_per_audio_second / 1e6:,.1f}",
        )
    return table
