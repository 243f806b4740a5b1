"""What a planned run needs and how long it takes on which hardware, in tables.

In: the cost of a step from `training.plan`, and how the run is spread. Out: a `Forecast`, and its tables for the console. Next:
`whisper-aut plan`. Times assume a share of the peak, which is an assumption and no measurement.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from rich.table import Table
from rich.text import Text

from whisper_aut.training.accelerators import ACCELERATORS, Accelerator
from whisper_aut.training.plan import GIBIBYTE, STAGES, DeviceMemory, StepCost, device_memory

ASSUMED_MFU = 0.40
LAUNCH_SECONDS = (
    10e-6  # of one operation by PyTorch without compilation; what small models wait for
)
RESERVED_GIB = 2.0  # CUDA's context, cuBLAS, communication buffers, gaps between blocks
CORE_AUDIO_SECONDS = 2_000  # a second, FLAC → log-mel on one core: decoding at 3,800 and features at 5,000 one after the other
FLAC_BYTES_PER_SECOND = 19_000  # of 16 kHz mono, where no index tells the shards' own


@dataclass(frozen=True)
class Forecast:
    """A planned run.

    Attributes:
        cost: of one micro-batch on one device, as the run is configured.
        plain, checkpointed: the same without and with gradient checkpointing.
        ranks: devices of the whole run.
        stage: the configured ZeRO stage, 0 for none.
        offload: optimiser state in host memory.
        deepspeed: half precision then means half weights with a master copy.
        precision: Lightning's.
        micro_batches: per optimiser step.
        steps: of the run; None where neither the config nor the shards say.
        step_audio_seconds: on one device in one optimiser step.
        bytes_per_audio_second: of the shards.
        assumptions: what the config did not say.
    """

    cost: StepCost
    plain: StepCost
    checkpointed: StepCost
    ranks: int
    stage: int
    offload: bool
    precision: str
    micro_batches: int
    steps: int | None
    step_audio_seconds: float
    bytes_per_audio_second: float
    assumptions: tuple[str, ...] = ()

    def memory(self, stage: int, cost: StepCost) -> DeviceMemory:
        half = stage > 0 and not self.precision.startswith("32")
        return device_memory(
            cost,
            stage=stage,
            ranks=self.ranks,
            half_weights=half,
            offload=self.offload and stage > 0,
        )

    def step_seconds(self, device: Accelerator) -> float:
        computing = self.cost.flops / (ASSUMED_MFU * device.peak_flops(self.precision))
        return self.micro_batches * max(computing, self.cost.operations * LAUNCH_SECONDS)

    def fits(self, device: Accelerator, memory: DeviceMemory) -> bool:
        return memory.total / GIBIBYTE + RESERVED_GIB <= device.memory_gib

    def what_fits(self, device: Accelerator) -> str:
        """Return the least measure that makes the run fit: none, then checkpointing, then higher stages."""
        if self.fits(device, self.memory(self.stage, self.cost)):
            return "fits as it is"
        for stage in range(self.stage, len(STAGES) if self.ranks > 1 else self.stage + 1):
            for cost, extra in ((self.plain, ""), (self.checkpointed, " + gradient checkpointing")):
                if self.fits(device, self.memory(stage, cost)):
                    return STAGES[stage] + extra
        return "too large: lower data.batch_clips" + ("" if self.ranks > 1 else " or add devices")


def tables(plan: Forecast) -> Iterator[Table | str]:
    """Yield the plan for the console, part by part."""
    cost = plan.cost
    millions = (f"{count / 1e6:,.1f} M" for count in (cost.encoder, cost.decoder, cost.trainable))
    yield "Parameters: encoder {}, decoder {}, trainable {}".format(*millions)
    yield (
        f"A step: {cost.flops * plan.micro_batches / 1e12:,.3g} TFLOP per device, {plan.step_audio_seconds:,.0f} audio-seconds per "
        f"device on {plan.ranks} device{'s' * (plan.ranks > 1)}, {plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)}"
        + (f"; {plan.steps:,} steps" if plan.steps else "; the number of steps is not known")
    )
    yield _memory_table(plan)
    yield _device_table(plan)
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
        memory = plan.memory(stage, plan.plain)
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.total,
        )
        lean = plan.memory(stage, plan.checkpointed).total
        marked = Text(name, style="bold" if stage == plan.stage else "")
        table.add_row(marked, *(f"{part / GIBIBYTE:.2f}" for part in (*parts, lean)))
    return table


def _device_table(plan: Forecast) -> Table:
    table = Table(
        title=f"On {plan.ranks} of these, at {ASSUMED_MFU:.0%} of their peak at most",
        title_justify="left",
    )
    for column in (
        "device",
        "what fits",
        "step",
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
            run,
            f"{audio:,.0f}",
            f"{max(1, -(-audio // CORE_AUDIO_SECONDS)):,.0f}",
            f"{audio * plan.bytes_per_audio_second / 1e6:,.1f}",
        )
    return table
