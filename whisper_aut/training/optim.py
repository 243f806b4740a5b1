"""AdamW with depth-band learning rates and a warm-up schedule.

Layer-wise learning rates follow BEiT (Bao et al. 2021, appendix): each encoder layer has
`layer_decay` times the rate of the layer above it. They are applied in `BANDS` bands of consecutive
layers, so that AdamW updates at most eight groups of parameters.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from whisper_aut.config import OptimSettings
from whisper_aut.models.decoders.base import Decoder
from whisper_aut.models.encoder import PackedEncoder

BANDS = 3


def parameter_groups(
    encoder: PackedEncoder, decoder: Decoder, optim: OptimSettings
) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer, at most eight.

    The convolutions and then the layers of the encoder are split into `BANDS` bands of equal depth,
    and the final norm belongs to the top band. A band has the geometric mean of the rates of its
    layers: the layer that is d layers below the top has `layer_decay ** d` times the encoder's
    rate. The decoder is a part of its own. Biases and norms of each part get no weight decay.
    Frozen parameters are left out.
    """
    whisper = encoder.whisper
    depth, top = len(whisper.layers), optim.lr if optim.encoder_lr is None else optim.encoder_lr
    by_depth = [nn.ModuleList([whisper.conv1, whisper.conv2]), *whisper.layers]
    parts: list[tuple[str, float, list[nn.Parameter]]] = []
    for band in np.array_split(np.arange(depth + 1), BANDS):
        if len(band):
            band_lr = top * optim.layer_decay ** float(depth - band.mean())
            inside = [p for index in band for p in by_depth[index].parameters()]
            parts.append(("encoder", band_lr, inside))
    parts[-1][2].extend(encoder.parameters())  # of which only the final norm is in no band yet
    parts.append(("decoder", optim.lr, list(decoder.trainable_parameters())))

    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    grouped: set[int] = set()
    for part, part_lr, parameters in parts:
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in grouped:
                grouped.add(id(parameter))
                decay = optim.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((part, part_lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": part_lr, "weight_decay": decay, "part": part}
        for (part, part_lr, decay), parameters in groups.items()
    ]


def lr_factor(step: int, optim: OptimSettings, total_steps: int, first_step: int = 0) -> float:
    """Return the factor on the learning rate at an optimizer step.

    Args:
        step: Optimizer step, counted from 0.
        optim: Linear warm-up, which ends at `total_steps` at the latest, and the decay after it.
        total_steps: Step at which the schedule ends.
        first_step: The factor is 0 before this step, and the warm-up starts here.
    """
    if step < first_step:
        return 0.0
    warmup_steps = min(optim.warmup_steps, total_steps - first_step)
    if step < first_step + warmup_steps:
        return (step - first_step + 1) / warmup_steps
    decay_steps = max(1, total_steps - first_step - warmup_steps)
    progress = min(1.0, (step - first_step - warmup_steps) / decay_steps)
    decay = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[optim.schedule]
    return optim.final_lr_fraction + (1 - optim.final_lr_fraction) * decay


def optimizer_factory(
    optim: OptimSettings, total_steps: int, *, cpu_offload: bool = False
) -> Callable[[Any, Any], dict[str, Any]]:
    """Return a function from `(encoder, decoder)` to Lightning's optimizer dictionary.

    With `cpu_offload`, the optimizer is DeepSpeed's CPU Adam.
    """
    lr_at = partial(lr_factor, optim=optim, total_steps=total_steps)
    encoder_lr_at = partial(lr_at, first_step=optim.encoder_after_step)

    def configure(encoder: Any, decoder: Any) -> dict[str, Any]:
        groups = parameter_groups(encoder, decoder, optim)
        options: Any = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
        if cpu_offload:
            # Imported only where it is used, because it builds a kernel.
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer: Any = DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
        else:
            # One kernel for all parameters is several times faster than a loop, on CPU and CUDA.
            optimizer = torch.optim.AdamW(groups, **options, fused=True)
            # Lightning does not clip gradients in mixed precision if the optimizer says that it
            # unscales them: https://github.com/Lightning-AI/pytorch-lightning/issues/21435
            optimizer._step_supports_amp_scaling = False
        factors = [encoder_lr_at if group["part"] == "encoder" else lr_at for group in groups]
        scheduler = LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    return configure
