"""Runs a function on several gloo ranks of this machine, for tests that need real collectives.

Ranks are forked from a server that has imported the training code once, so a launch costs about a
second and not an import per rank.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only

SECONDS = 900
# DeepSpeed's first engine imports Muon, which imports PyTorch's compiler: 3 s.
IMPORTED_ONCE = ["whisper_aut.training.train", "deepspeed.runtime.zero.muon.muon_optimizer"]


def on_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """Call `function(*arguments)` on every rank, in an environment like torchrun's.

    Returns:
        Per rank what it returned, or the text of the traceback that ended it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED_ONCE, __name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(sender, function, arguments, rank, ranks, port), daemon=False
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results: list[Any] = []
    for receiver, process in zip(pipes, processes, strict=True):
        try:
            results.append(receiver.recv() if receiver.poll(SECONDS) else "no answer in time")
        except EOFError:
            results.append("the rank ended without an answer")
        if results[-1] == "no answer in time":
            process.kill()
        process.join()
    return results


def _run(
    sender: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    ranks: int,
    port: int,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except BaseException:
        result = traceback.format_exc()
    sender.send(result)
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def join_gloo() -> None:
    """Make the ranks a process group, where no strategy does it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
