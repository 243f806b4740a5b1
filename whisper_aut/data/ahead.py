"""Encoded clips → waveforms, decoded by threads ahead of whoever consumes them.

In: anything that names clips, and how to load one. Out: the same items in the same order, each with its waveform `[S]` or its refusal.
Next: `probes.clips` and `export.embed`. libsndfile and libsoxr release the GIL, so threads keep an encoder fed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from whisper_aut.errors import SampleRefused

LOOKAHEAD_CLIPS, LOOKAHEAD_BYTES = 256, 64 << 20  # hours of audio in one file stay one at a time

Item = TypeVar("Item")


def decoded_ahead(
    items: Iterable[Item],
    load: Callable[[Item], Tensor],
    encoded_bytes: Callable[[Item], int],
    workers: int,
) -> Iterator[tuple[Item, Tensor | SampleRefused]]:
    """Yield each item with what `load` returns for it, or with the refusal that it raises."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    ahead: deque[tuple[Item, Future[Tensor]]] = deque()
    source, waiting = iter(items), 0
    try:
        while True:
            while not ahead or (len(ahead) < LOOKAHEAD_CLIPS and waiting < LOOKAHEAD_BYTES):
                try:
                    item = next(source)
                except StopIteration:
                    break
                ahead.append((item, pool.submit(load, item)))
                waiting += encoded_bytes(item)
            if not ahead:
                return
            item, future = ahead.popleft()
            waiting -= encoded_bytes(item)
            yield item, _outcome(future)
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(future: Future[Tensor]) -> Tensor | SampleRefused:
    try:
        return future.result()
    except SampleRefused as refused:
        return refused
