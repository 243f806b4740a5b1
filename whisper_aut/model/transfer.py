"""Small tensors that the host makes for a device, such as indices and bounds of clips, without a wait for it.

In: a tensor of the host. Out: its copy on the device. From ordinary memory a copy to a GPU would block until everything queued before
it is done; from pinned memory it queues behind.
"""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host's tensor on the device, queued where that is a GPU."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )
