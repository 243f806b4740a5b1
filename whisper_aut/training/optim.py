"""AdamW with decay groups, layer-wise learning rates and a warm-up schedule.

Biases and norms get no weight decay. Layer-wise learning rates follow BEiT (Bao et al. 2021,
appendix): the top encoder layer gets the full rate, and each layer below gets `layer_decay` times
the rate of the layer above it.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from whisper_aut.models.decoders.base import Decoder
from whisper_aut.models.encoder import PackedEncoder

Schedule = Literal["cosine", "linear", "constant"]


def parameter_groups(
    encoder: PackedEncoder,
    decoder: Decoder,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    encoder_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer: one for each part, learning rate and decay.

    Frozen parameters are left out.

    Args:
        encoder: The encoder.
        decoder: The decoder.
        lr: Learning rate of the decoder, and of the top encoder layer if `encoder_lr` is None.
        weight_decay: Weight decay of parameters with more than one dimension.
        layer_decay: Factor on the learning rate from one encoder layer to the next lower one.
        encoder_lr: Learning rate of the top encoder layer.
    """
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}

    def add(parameters: Iterable[nn.Parameter], rate: float, part: str = "encoder") -> None:
        for parameter in parameters:
            if parameter.requires_grad:
                groups.setdefault(
                    (part, rate, weight_decay if parameter.ndim > 1 else 0.0), []
                ).append(parameter)

    top = lr if encoder_lr is None else encoder_lr

    layers = encoder.whisper.layers
    depth = len(layers)
    for number, layer in enumerate(layers):
        add(layer.parameters(), top * layer_decay ** (depth - 1 - number))
    inside = {id(parameter) for parameter in layers.parameters()}
    stem = [
        parameter
        for module in (encoder.whisper.conv1, encoder.whisper.conv2)
        for parameter in module.parameters()
    ]
    add(stem, top * layer_decay**depth)
    placed = inside | {id(parameter) for parameter in stem}
    add((parameter for parameter in encoder.parameters() if id(parameter) not in placed), top)
    add(decoder.trainable_parameters(), lr, "decoder")
    return [
        {"params": params, "lr": rate, "weight_decay": decay, "part": part}
        for (part, rate, decay), params in groups.items()
    ]


def lr_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    schedule: Schedule,
    final_share: float,
    first_step: int = 0,
) -> float:
    """Return the factor on the learning rate at an optimizer step.

    Args:
        step: Optimizer step, counted from 0.
        total_steps: Step at which the schedule ends.
        warmup_steps: Length of the linear warm-up.
        schedule: Shape of the decay after the warm-up.
        final_share: Factor at the end of the schedule.
        first_step: The factor is 0 before this step, and the warm-up starts here.
    """
    if step < first_step:
        return 0.0
    if step < first_step + warmup_steps:
        return (step - first_step + 1) / warmup_steps
    done = min(
        1.0, (step - first_step - warmup_steps) / max(1, total_steps - first_step - warmup_steps)
    )
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[
        schedule
    ]
    return final_share + (1 - final_share) * shape


def optimizer_factory(
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    layer_decay: float,
    total_steps: int,
    warmup_steps: int,
    schedule: Schedule,
    final_share: float,
    encoder_lr: float | None = None,
    encoder_after_step: int = 0,
    cpu_offload: bool = False,
) -> Callable[[nn.Module, nn.Module], dict[str, Any]]:
    """Return a function from `(encoder, decoder)` to Lightning's optimizer dictionary.

    Args:
        lr: As in `parameter_groups`.
        weight_decay: As in `parameter_groups`.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        layer_decay: As in `parameter_groups`.
        total_steps: As in `lr_factor`.
        warmup_steps: As in `lr_factor`.
        schedule: As in `lr_factor`.
        final_share: As in `lr_factor`.
        encoder_lr: As in `parameter_groups`.
        encoder_after_step: The encoder's learning rate is 0 before this step and warms up from it.
        cpu_offload: Use DeepSpeed's CPU Adam.
    """

    def make(encoder: Any, decoder: Any) -> dict[str, Any]:
        groups = parameter_groups(encoder, decoder, lr, weight_decay, layer_decay, encoder_lr)
        if cpu_offload:
            # Imported only where it is used, because it builds a kernel.
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer: Any = DeepSpeedCPUAdam(groups, lr=lr, betas=betas, eps=eps, adamw_mode=True)
        else:
            # One kernel for all parameters is several times faster than a loop, on CPU and CUDA.
            optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
            # A fused optimizer can unscale gradients itself, and Lightning does not clip gradients
            # for such optimizers in bf16-mixed and 16-mixed.
            optimizer._step_supports_amp_scaling = False
        shape = partial(
            lr_factor,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            schedule=schedule,
            final_share=final_share,
        )
        late = partial(shape, first_step=encoder_after_step)
        scheduler = LambdaLR(
            optimizer, [late if group["part"] == "encoder" else shape for group in groups]
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    return make
