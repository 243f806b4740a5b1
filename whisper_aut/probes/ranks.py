"""Embedding by several processes: each rank of a `torchrun` job takes its share of every folder, the first one joins them.

In: encoders and tasks, as `probes.suite` takes them, and a cache folder that all ranks see. Out: the same cache files that one process
would have written, clip for clip in the same order. Next: `probes.suite`, in the first rank, which finds everything embedded.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from whisper_aut.corpora.shards import ShardIndex, open_index
from whisper_aut.errors import UserError
from whisper_aut.probes.cache import Embeddings, cache_path, read_embeddings, write_embeddings
from whisper_aut.probes.clips import WHOLE, Share
from whisper_aut.probes.embed import (
    EmbedSettings,
    FrameEncoder,
    check_refused,
    embed_task,
    folder_identity,
    view_of,
)
from whisper_aut.probes.kinds import KINDS, kind_for
from whisper_aut.probes.tasks import ProbeTask

PATIENCE = timedelta(
    hours=12
)  # a rank that ends is noticed at once; this is for one that has more to embed


def launched_share() -> Share:
    """Return this process's share, as `torchrun` tells it by RANK and WORLD_SIZE; the whole without."""
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextmanager
def joined_ranks(share: Share) -> Iterator[None]:
    """Join the process group of all ranks, and leave it however the block ends: the others notice then."""
    if share == WHOLE:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class SharedEmbedding:
    """What is embedded together.

    Attributes:
        encoders, tasks, root, cache, embedding, kind: as `suite.run_suite` takes them.
    """

    encoders: Mapping[str, FrameEncoder]
    tasks: Sequence[ProbeTask]
    root: str | Path | None
    cache: str | Path
    embedding: EmbedSettings
    kind: str

    def run(self, share: Share) -> None:
        """Embed a share of everything, wait for the other ranks, and in the first rank join what all of them made.

        Inside `joined_ranks`.

        Raises:
            UserError: what `embed_task` raises, another rank is gone, or the ranks do not see one cache folder.
        """
        views = {task.name: KINDS[kind_for(self.kind, task)].view for task in self.tasks}
        fingerprints = {name: encoder.fingerprint() for name, encoder in self.encoders.items()}
        for name, encoder in self.encoders.items():
            for task in self.tasks:
                embed_task(
                    encoder,
                    task,
                    self.root,
                    self.cache,
                    self.embedding,
                    fingerprints[name],
                    views[task.name],
                    share,
                )
        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError(
                f"Another rank is gone: {str(error).splitlines()[0][:300]}. Start again: shares are kept."
            ) from error
        if share.rank == 0:
            self._join(share.ranks, fingerprints, views)

    def _join(
        self,
        ranks: int,
        fingerprints: Mapping[str, str],
        views: Mapping[str, str],
    ) -> None:
        for name, encoder in self.encoders.items():
            for task in self.tasks:
                view = view_of(encoder, self.embedding, views[task.name], task)
                for index in (
                    open_index(folder)
                    for part in task.parts
                    for folder in task.folders(part, self.root)
                ):
                    identity = folder_identity(
                        fingerprints[name], view, index, task, self.embedding
                    )
                    join_shares(self.cache, identity, ranks, index, self.embedding)


def join_shares(
    cache: str | Path,
    identity: dict[str, object],
    ranks: int,
    index: ShardIndex,
    settings: EmbedSettings,
) -> None:
    """Put the shares of a folder end to end under the folder's own identity, where it is not there yet.

    Raises:
        UserError: a share is not there, or too many clips of the folder are broken.
    """
    if read_embeddings(cache, identity) is not None:
        return
    identities = [Share(rank, ranks).identity(identity) for rank in range(ranks)]
    found = [read_embeddings(cache, share) for share in identities]
    parts = [part for part in found if part is not None]
    if len(parts) < ranks:
        raise UserError(
            f"Rank {found.index(None)} left no embeddings of {index.root} in {cache}. All ranks must see one folder: put --out on a "
            "disk that they share."
        )
    joined = Embeddings.join(parts)
    check_refused(index, joined.skipped, settings)
    write_embeddings(cache, identity, joined)
    for share in identities:
        cache_path(cache, share).unlink(missing_ok=True)
