"""Reading shards from a server: bytes and requests, and the speed next to a plain download.

A server on this machine answers every request after 20 ms and sends to all clients together at most
a set number of bytes a second. Without decoding, the clips of one epoch are only read, by one rank
or by two; the other side downloads the same tars in requests of 8 MB, four at a time, or is another
reader: webdataset's own pipeline. With decoding, clips become log-mels; the other side is the time
that the link needs. S3 is that of moto, without a limit; there the other sides are the download and
mosaicml-streaming, where it is installed (it does not read over HTTP). Before anything is timed, it
is checked that all clips arrive once, that no byte is fetched twice, and that requests are large.
Every side reads all clips, with the audio as bytes and the annotation parsed.

Run it while nothing else runs on its cores: taskset -c 0,1 python benchmarks/all.py --runs 3 remote
"""

import io
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from multiprocessing import Process
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from pairs import Row, compare_values, main

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import LogMel
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.batch import Batch, TokenTarget, collate
from whisper_aut.data.dataset import BatchStream, ExampleBuilder, StreamSource, batch_loader
from whisper_aut.data.reader import DEFAULT_POLICY, Sample, read_range
from whisper_aut.data.sampler import ByClips, Cursor, EpochOrder, SourceShape
from whisper_aut.data.shards import ShardIndex, iter_samples, open_index
from whisper_aut.data.writer import ShardWriter

LATENCY_SECONDS = 0.02
FAST, SLOW = 200e6, 20e6  # bytes per second
CLIPS, SECONDS, TAR_BYTES = 1600, 10.0, 64 << 20  # about 280 kB a clip
PARTITIONS, BATCH_CLIPS = 4, 16  # 112 MB a partition
SEND_BYTES = 1 << 18


class Handler(BaseHTTPRequestHandler):
    """Serves ranges of files in a folder over a link of limited speed, and counts what it sends."""

    folder: ClassVar[Path]
    bytes_per_second: ClassVar[float]
    lock: ClassVar[Any] = threading.Lock()
    free_at: ClassVar[float] = 0.0  # when the link has sent everything so far
    sent: ClassVar[dict[str, int]] = {"bytes": 0, "requests": 0}
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        time.sleep(LATENCY_SECONDS)
        path = self.folder / self.path.lstrip("/")
        if not path.exists():
            self.send_error(404)
            return
        size = path.stat().st_size
        start, end = 0, size
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(size, int(last) + 1)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if not body:
            return
        if path.suffix == ".tar":
            with self.lock:
                self.sent["bytes"] += end - start
                self.sent["requests"] += 1
        with path.open("rb") as file:
            file.seek(start)
            for offset in range(start, end, SEND_BYTES):
                data = file.read(min(SEND_BYTES, end - offset))
                with self.lock:
                    now = time.monotonic()
                    Handler.free_at = max(now, Handler.free_at) + len(data) / self.bytes_per_second
                    pause = Handler.free_at - now
                time.sleep(pause)
                self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(folder: Path, bytes_per_second: float, pipe: Connection) -> None:
    """Serve until asked to stop. Runs in its own process, which answers with the counts so far."""
    Handler.folder, Handler.bytes_per_second = folder, bytes_per_second
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(f"http://127.0.0.1:{server.server_address[1]}")
    while pipe.recv():
        pipe.send(dict(Handler.sent))


class Link:
    """A served folder."""

    def __init__(self, folder: Path, bytes_per_second: float):
        self.pipe, other = Pipe()
        self.process = Process(target=serve, args=(folder, bytes_per_second, other), daemon=True)
        self.process.start()
        self.url = self.pipe.recv()

    def sent(self) -> dict[str, int]:
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join()


class OneToken:
    """A codec that makes no work, so that reading and decoding are what is measured."""

    @property
    def metrics(self) -> dict[str, Any]:
        return {}

    def encode(self, annotation: Annotation, domain: str, position: int) -> TokenTarget:
        return TokenTarget(torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool), 0)

    def decode(self, tokens: list[int]) -> str:
        return ""


class Keys(BatchStream):
    """A stream that reads clips and returns their keys, without decoding them."""

    def _collate(self, batch: Any, clips: Any, prefetcher: Any, next_cursor: Cursor) -> Batch:
        self.keys = getattr(self, "keys", [])
        self.keys += [prefetcher.take(clip).key for clip in clips]
        return collate([], [], 80, next_cursor)


def stream(index: ShardIndex, *, decode: bool, rank: int = 0, ranks: int = 1) -> Any:
    """Return one rank's part of an epoch of clips in four partitions, without workers."""
    shape = SourceShape(index.fingerprint(), index.shard_samples, 1.0, index.sample_bytes)
    order = EpochOrder([shape], 0, 1000, epochs=1, partitions=PARTITIONS)
    batching = ByClips(order, BATCH_CLIPS)
    count = -(-batching.count(Cursor(), order.end) // ranks)
    build = ExampleBuilder(LogMel(80), OneToken(), ClipLimits())
    kind = BatchStream if decode else Keys
    sources = [StreamSource(index, "sound")]
    of_rank: Any = {"rank": rank, "ranks": ranks}
    return kind(order, batching, sources, build, end=order.end, count=count, **of_rank)


def read(url: str) -> float:
    """Return the seconds in which an epoch is read."""
    index = open_index(url)

    def clips() -> int:
        epoch = stream(index, decode=False)
        for _ in epoch:
            pass
        return len(epoch.keys)

    return seconds(clips, index.samples)


def read_rank(url: str, rank: int, ranks: int) -> None:
    for _ in stream(open_index(url), decode=False, rank=rank, ranks=ranks):
        pass


def read_by_ranks(url: str, ranks: int) -> float:
    """Return the seconds in which processes read an epoch together, their start included."""
    processes = [Process(target=read_rank, args=(url, rank, ranks)) for rank in range(ranks)]

    def run() -> None:  # `check` has counted the clips
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a rank failed with exit code {process.exitcode}")

    return seconds(run)


def read_by_webdataset(url: str) -> float:
    """Return the seconds of webdataset's own pipeline, which streams each tar through curl."""
    import webdataset

    index = open_index(url)
    tars = [f"pipe:curl -sf {index.url(number)}" for number in range(len(index.shards))]

    def clips() -> int:
        dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0)  # pyright: ignore
        return sum(bool(json.loads(sample["json"])) for sample in dataset.shuffle(1000))

    return seconds(clips, index.samples)


def read_by_streaming(url: str, folder: Path) -> float:
    """Return the seconds of mosaicml-streaming, which caches its shards on the disk."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]

    with TemporaryDirectory(dir=folder) as cache:
        options = {"shuffle": True, "batch_size": BATCH_CLIPS, "shuffle_seed": 0}
        dataset = StreamingDataset(remote=url, local=cache, **options)
        return seconds(lambda: sum(bool(sample["text"]) for sample in dataset), CLIPS)


def write_mds(folder: Path, out: Path) -> None:
    """Write the clips of shards in the format of mosaicml-streaming."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    columns = {"audio": "bytes", "text": "str"}
    with MDSWriter(out=str(out), columns=columns, size_limit=TAR_BYTES) as writer:
        for item in iter_samples(open_index(folder), ClipLimits()):
            assert isinstance(item, Sample)
            writer.write({"audio": item.audio, "text": item.annotation.text})


def decoded(url: str, workers: int) -> float:
    """Return the seconds in which an epoch becomes log-mels, the start of workers included."""
    index = open_index(url)

    def clips() -> int:
        return sum(len(batch) for batch in batch_loader(stream(index, decode=True), workers))

    return seconds(clips, index.samples)


def download(url: str) -> float:
    """Return the seconds of a plain download, four requests at a time."""
    index, size = open_index(url), 8 << 20
    ranges = [
        (index.url(number), start, min(start + size, shard.bytes))
        for number, shard in enumerate(index.shards)
        for start in range(0, shard.bytes, size)
    ]

    def fetch(part: tuple[str, int, int]) -> int:
        return len(read_range(*part, DEFAULT_POLICY))

    with ThreadPoolExecutor(4) as pool:
        return seconds(lambda: sum(pool.map(fetch, ranges)))


def seconds(action: Callable[[], Any], expected: int | None = None) -> float:
    """Return the seconds of an action, which has to return `expected`, if that is given."""
    begin = time.perf_counter()
    found = action()
    taken = time.perf_counter() - begin
    if expected is not None and found != expected:
        raise AssertionError(f"{found} clips were read instead of {expected}")
    return taken


def shards(folder: Path) -> None:
    """Write clips of noise, which FLAC hardly compresses."""
    random = np.random.default_rng(0)
    noise = (0.1 * random.standard_normal(round(SECONDS * 16_000))).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 16_000, format="FLAC")
    annotation = Annotation(text="x", domain="sound", duration_seconds=SECONDS)
    with ShardWriter(folder, max_bytes=TAR_BYTES) as out:
        for number in range(CLIPS):
            out.write(f"{number:06d}", "flac", buffer.getvalue(), annotation)


def check(link: Link) -> tuple[float, float]:
    """Return the bytes fetched per byte of an epoch, and the requests per 8 MB."""
    index = open_index(link.url)
    total, before = sum(shard.bytes for shard in index.shards), link.sent()
    epoch = stream(index, decode=False)
    for _ in epoch:
        pass
    if sorted(epoch.keys) != [f"{number:06d}" for number in range(index.samples)]:
        raise AssertionError("an epoch is not every clip once")
    after = link.sent()
    fetched = (after["bytes"] - before["bytes"]) / total
    requests = (after["requests"] - before["requests"]) / (total / (8 << 20))
    if fetched > 1.05 or requests > 1:
        raise AssertionError(f"{fetched:.3f} bytes per byte, {requests:.2f} requests per 8 MB")
    return fetched, requests


def serve_s3(pipe: Connection) -> None:
    """Run moto's S3 until asked to stop, in a process of its own."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    pipe.send("http://{}:{}".format(*server.get_host_and_port()))
    pipe.recv()


def s3_cases(folder: Path, runs: int) -> Iterator[Row]:
    """Read the same shards from moto's S3, which answers at once."""
    import boto3

    pipe, other = Pipe()
    Process(target=serve_s3, args=(other,), daemon=True).start()
    try:
        url = pipe.recv()
        account = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        region = {"AWS_DEFAULT_REGION": "us-east-1"}
        names = ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")  # the second is that of mosaicml-streaming
        os.environ |= dict.fromkeys(names, url) | account | region
        client = boto3.client("s3")

        def upload(source: Path, bucket: str) -> None:
            client.create_bucket(Bucket=bucket)
            for path in sorted(source.glob("*.*")):
                client.upload_file(str(path), bucket, path.name)

        upload(folder, "bench")
        yield compare_values(
            "reading from S3 (moto)",
            lambda: read("s3://bench"),
            lambda: download("s3://bench"),
            unit="s",
            against=PLAIN,
            runs=runs,
        )
        if find_spec("streaming"):
            write_mds(folder, folder / "mds")
            upload(folder / "mds", "mds")
            yield compare_values(
                "reading from S3 (moto)",
                lambda: read("s3://bench"),
                lambda: read_by_streaming("s3://mds", folder),
                unit="s",
                against="mosaicml-streaming",
                runs=runs,
            )
    finally:
        pipe.send("stop")


PLAIN = "plain download, 8 MB a request, 4 at a time"


def cases(runs: int) -> Iterator[Row]:
    with TemporaryDirectory() as folder:
        shards(Path(folder))
        link = Link(Path(folder), FAST)
        try:
            fetched, requests = check(link)
            title = f"reading at {FAST / 1e6:.0f} MB/s"
            counts = f"{fetched:.3f} bytes a byte, {requests:.2f} requests per 8 MB"
            sides: list[tuple[str, Callable[[], float], Callable[[], float], str]] = [
                (f"{title}: {counts}", lambda: read(link.url), lambda: download(link.url), PLAIN),
                (
                    f"{title}, two ranks",
                    lambda: read_by_ranks(link.url, 2),
                    lambda: read_by_ranks(link.url, 1),
                    "one rank in a process of its own",
                ),
                (
                    title,
                    lambda: read(link.url),
                    lambda: read_by_webdataset(link.url),
                    "webdataset's own pipeline over curl",
                ),
            ]
            for case, ours, theirs, against in sides:
                yield compare_values(case, ours, theirs, unit="s", against=against, runs=runs)
        finally:
            link.close()
        yield from s3_cases(Path(folder), runs)
        link = Link(Path(folder), SLOW)
        try:
            for workers in (0, 2):
                yield compare_values(
                    f"with decoding at {SLOW / 1e6:.0f} MB/s, {workers} workers",
                    partial(decoded, link.url, workers),
                    lambda: sum(shard.bytes for shard in open_index(link.url).shards) / SLOW,
                    unit="s",
                    against="the link",
                    runs=runs,
                )
        finally:
            link.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(cases, "Shards from a server")
