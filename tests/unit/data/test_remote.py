"""Shards over HTTP and S3, through servers that fail: a full epoch arrives, and nothing is lost."""

import http.server
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.audio import write_shards
from tests.support.downloads import serve
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import LogMel
from whisper_aut.corpora.inspect import inspect_shards
from whisper_aut.data import sampler, shards
from whisper_aut.data.datamodule import ShardDataModule
from whisper_aut.data.dataset import READ_THREADS, ExampleBuilder, StreamSource
from whisper_aut.data.filters import select_samples
from whisper_aut.data.reader import ReadPolicy, open_stream, read_range
from whisper_aut.data.sampler import Cursor, batches_from
from whisper_aut.data.shards import ShardReader, open_index
from whisper_aut.data.targets import WhisperText
from whisper_aut.data.writer import index_folder
from whisper_aut.errors import SkipReason, UserError
from whisper_aut.models.pretrained import PretrainedWhisper

PATIENT = ReadPolicy(retries=6, timeout_seconds=5, pause_seconds=0.005)
CLIPS = 30


@pytest.fixture(scope="module")
def build(tiny_whisper: Path) -> ExampleBuilder:
    return ExampleBuilder(
        LogMel(80), WhisperText(PretrainedWhisper(str(tiny_whisper)).tokenizer), ClipLimits()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(
        tmp_path_factory.mktemp("served") / "sound", CLIPS, "sound", per_shard_bytes=200_000
    )


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, and does to every request what `fault` says for its number."""

    def __init__(self, folder: Path, fault: Callable[[int], str], *, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.ranges = folder, fault, ranges
        self.requests, self.lock = 0, threading.Lock()
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tar_ranges(self) -> list[tuple[str, int, int]]:
        """Return the path, first and last byte of every range of a tar that was requested."""
        ranges = []
        for path, wanted in self.asked:
            if wanted and path.endswith(".tar"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                ranges.append((path, int(first), int(last)))
        return ranges

    def tar_bytes(self) -> int:
        return sum(last - first + 1 for _, first, last in self.tar_ranges())


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        with self.server.lock:
            self.server.requests += 1
            fault = self.server.fault(self.server.requests)
            self.server.asked.append((self.path, self.headers.get("Range", "")))
        path = self.server.folder / self.path.lstrip("/")
        if not path.exists():
            self.send_error(404)
            return
        if fault == "busy":
            self.send_error(503)
            return
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        data, status = path.read_bytes(), 200
        size, wanted = len(data), self.headers.get("Range", "")
        if self.server.ranges and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        if fault != "no size":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = fault in ("cut", "no size")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(
    folder: Path, fault: Callable[[int], str] = lambda number: "", *, ranges: bool = True
) -> Iterator[Server]:
    server = Server(folder, fault, ranges=ranges)
    serve(server)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def epoch(
    root: str, build: ExampleBuilder, policy: ReadPolicy = PATIENT, **options: Any
) -> tuple[Counter[str], Counter[SkipReason]]:
    source = StreamSource(open_index(root, policy), "sound")
    chosen = {"seed": 0, "window": 12, "batch_clips": 4, "epochs": 1, **options}
    batches = list(ShardDataModule([source], [], [1.0], build, **chosen).train_dataloader())
    keys = Counter(key for batch in batches for key in batch.keys)
    return keys, Counter(refusal.reason for batch in batches for refusal in batch.skipped)


def every_third(kind: str) -> Callable[[int], str]:
    return lambda number: "" if number % 3 else kind


@pytest.mark.parametrize("fault", ["drop", "cut", "busy"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_server_that_fails_every_third_request_feeds_a_full_epoch(
    folder: Path, build: ExampleBuilder, fault: str, ranges: bool
):
    with served(folder, every_third(fault), ranges=ranges) as server:
        keys, refused = epoch(server.url, build, batch_seconds=31.0)
    assert (len(keys), set(keys.values()), refused) == (CLIPS, {1}, Counter())


def test_data_workers_read_a_faulty_server_too(folder: Path, build: ExampleBuilder):
    with served(folder, every_third("drop")) as server:
        keys, refused = epoch(server.url, build, workers=2)
    assert (len(keys), refused) == (CLIPS, Counter())


def test_reading_goes_on_inside_a_file_by_a_range_request(tmp_path: Path):
    content = bytes(range(256)) * 40_000  # 10 MB: two requests, after one for the size
    (tmp_path / "file.tar").write_bytes(content)
    with served(tmp_path, lambda number: "cut" if number == 3 else "") as server:
        with open_stream(f"{server.url}/file.tar", PATIENT) as stream:
            assert stream.read() == content
        starts = [int(wanted[6:].partition("-")[0]) for _, wanted in server.asked if wanted]
    assert starts.count(0) == 1  # the fault came later, and nothing was read from the start again


def test_a_sample_table_spares_the_bytes_of_other_samples(tmp_path: Path):
    folder = write_shards(tmp_path / "sound", 40, "sound", per_shard_bytes=1 << 30)
    with served(folder) as server:
        index, reader = open_index(server.url, PATIENT), ShardReader(ClipLimits())
        item = reader.read(index, {7: (0, 7)})[7]
        assert item.key == "sound-0007"
        assert 0 < server.tar_bytes() < 0.1 * index.shards[0].bytes


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("batch_seconds", [None, 31.0])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_together_fetch_each_byte_once_in_large_requests(
    tmp_path: Path,
    build: ExampleBuilder,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    batch_seconds: float | None,
    selected: bool,
):
    """Four partitions, the windows of each a quarter of its part; a resume reads windows again."""
    folder = write_shards(tmp_path / "sound", 96, "sound", per_shard_bytes=400_000)
    total = sum(shard.bytes for shard in open_index(folder).shards)
    monkeypatch.setattr(sampler, "WINDOW_BYTES", total // 16)
    with served(folder) as server:
        index = open_index(server.url, PATIENT)
        if selected:  # all but a few: it pays to fetch them too
            excluded = [(shard.name, f"sound-{n:04d}") for shard in index.shards for n in (5, 50)]
            index = select_samples(index, excluded)
        module = ShardDataModule(
            [StreamSource(index, "sound")],
            [],
            [1.0],
            build,
            seed=0,
            window=1,
            partitions=4,
            batch_clips=2,
            batch_seconds=batch_seconds,
            epochs=1,
        )
        end = module.order.epoch_clips
        whole = [batch for batch, _ in batches_from(module.batching, Cursor(), end)]
        count = -(-len(whole) // ranks)
        keys = Counter()
        for rank in range(ranks):
            for batch in module.train_stream(rank, ranks, Cursor(), end, count):
                keys.update(batch.keys)
                assert not batch.skipped
        assert (len(keys), set(keys.values())) == (index.samples, {1})
        assert server.tar_bytes() <= total
        requests = len(server.tar_ranges())
        assert requests <= 16 + 4 + len(index.shards)
        _, cursor = list(batches_from(module.batching, Cursor(), end))[len(whole) // 2]
        before = server.tar_bytes()
        assert list(module.train_stream(0, 1, cursor, end, count * ranks))
        assert server.tar_bytes() - before <= 0.5 * total + 4 * (total // 16 + total // 96)


def test_partitions_shared_by_workers_fetch_only_the_clips_of_each(
    folder: Path,
    build: ExampleBuilder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(shards, "MAX_GAP_BYTES", 0)
    total = sum(shard.bytes for shard in open_index(folder).shards)
    with served(folder) as server:
        keys, skipped = epoch(server.url, build, partitions=3, workers=2)
        assert server.tar_bytes() <= total
    assert (len(keys), set(keys.values()), skipped) == (CLIPS, {1}, Counter())
    assert "Set data.partitions to a multiple of 2" in caplog.text


def test_when_attempts_run_out_the_samples_are_refused_and_the_run_goes_on(
    folder: Path, build: ExampleBuilder
):
    hasty = ReadPolicy(retries=1, timeout_seconds=2, pause_seconds=0.001)
    source_down = threading.Event()
    with served(folder, lambda number: "busy" if source_down.is_set() else "") as server:
        source = StreamSource(open_index(server.url, hasty), "sound")
        module = ShardDataModule(
            [source], [], [1.0], build, seed=0, window=12, batch_clips=4, epochs=1
        )
        source_down.set()
        batches = list(module.train_dataloader())
    assert Counter(refusal.reason for batch in batches for refusal in batch.skipped) == {
        SkipReason.BAD_TAR: CLIPS
    }
    assert all(
        "given up after 2 attempts" in refusal.detail
        for batch in batches
        for refusal in batch.skipped
    )


def test_what_is_not_there_is_not_asked_for_again(folder: Path):
    with served(folder) as server:
        with pytest.raises(UserError, match=r"no index\.json at .*whisper-aut data index"):
            open_index(f"{server.url}/nowhere", ReadPolicy(pause_seconds=60))
        assert server.requests <= 4
    with pytest.raises(UserError, match="given up after 2 attempts"):
        open_index(server.url, ReadPolicy(retries=1, timeout_seconds=1, pause_seconds=0.001))


def test_shards_of_a_server_that_reports_no_sizes_are_inspected(folder: Path):
    with served(folder, lambda _: "no size", ranges=False) as server:
        statistics = inspect_shards(server.url)
    assert statistics.clips == CLIPS
    assert statistics.bytes == sum(shard.bytes for shard in open_index(folder).shards)


def test_shards_of_a_server_that_reports_no_sizes_are_indexed(folder: Path, tmp_path: Path):
    with served(folder, lambda _: "no size", ranges=False) as server:
        url = f"{server.url}/shard-{{000000..000001}}.tar"
        found = index_folder(url, tmp_path, policy=PATIENT).shards
    expected = open_index(folder).shards[:2]
    assert [(one.samples, one.bytes) for one in found] == [
        (one.samples, one.bytes) for one in expected
    ]


def test_a_server_without_range_requests_is_named_once_and_sends_few_whole_files(
    folder: Path, build: ExampleBuilder, caplog: pytest.LogCaptureFixture
):
    tars = len(open_index(folder).shards)
    with served(folder, ranges=False) as server:
        keys, skipped = epoch(server.url, build)
        sent = sum(path.endswith(".tar") for path, _ in server.asked)
    assert (len(keys), skipped) == (CLIPS, Counter())
    assert caplog.text.count("does not support range requests") == 1
    assert sent <= 4 * tars + READ_THREADS


def test_a_part_of_a_remote_folder_is_named_by_a_pattern(folder: Path, build: ExampleBuilder):
    tars = len(open_index(folder).shards)
    with served(folder) as server:
        keys, refused = epoch(
            f"{server.url}/shard-{{000000..000001}}.tar", build, batch_seconds=31.0
        )
        with pytest.raises(UserError, match=f"holds no shard-{tars:06d}.tar"):
            open_index(f"{server.url}/shard-{{000000..{tars:06d}}}.tar")
    index = open_index(folder)
    assert (len(keys), refused) == (sum(index.shard_samples[:2]), Counter())


def test_a_silent_server_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar"
        with pytest.raises(OSError, match="given up"):
            read_range(url, 0, 1, ReadPolicy(retries=0, timeout_seconds=0.3))


def test_s3_feeds_a_full_epoch(
    folder: Path, build: ExampleBuilder, monkeypatch: pytest.MonkeyPatch
):
    moto = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import s3fs

        store = s3fs.S3FileSystem()
        store.mkdir("corpus")
        store.put(str(folder), "corpus/sound", recursive=True)
        for seconds in (None, 31.0):
            keys, refused = epoch("s3://corpus/sound", build, batch_seconds=seconds)
            assert (len(keys), set(keys.values()), refused) == (CLIPS, {1}, Counter())
        with pytest.raises(UserError, match=r"no index\.json"):
            open_index("s3://corpus/elsewhere", PATIENT)
        store.put([str(tar) for tar in sorted(folder.glob("*.tar"))], "corpus/bare/")
        index = index_folder("s3://corpus/bare")
        assert (index.samples, index.has_tables) == (CLIPS, True)
        keys, refused = epoch("s3://corpus/bare", build, batch_seconds=31.0)
        assert (len(keys), refused) == (CLIPS, Counter())
    finally:
        server.stop()


def test_tars_from_elsewhere_become_readable_over_a_network(
    folder: Path, build: ExampleBuilder, tmp_path: Path
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for tar in folder.glob("*.tar"):
        (bare / tar.name).write_bytes(tar.read_bytes())
    local, remade = open_index(bare), index_folder(bare)
    assert [shard.samples for shard in local.shards] == [shard.samples for shard in remade.shards]
    ours = open_index(folder)
    assert [shard.sha256 for shard in remade.shards] == [shard.sha256 for shard in ours.shards]
    assert remade.seconds == pytest.approx(ours.seconds, abs=0.001 * CLIPS)
    for number in range(len(ours.shards)):
        assert (remade.table(number).starts == ours.table(number).starts).all()
        assert (remade.table(number).milliseconds == ours.table(number).milliseconds).all()
    with served(bare) as server:
        assert epoch(server.url, build)[0] == epoch(str(folder), build)[0]


def test_an_index_on_a_disk_reads_tars_that_stay_on_a_server(
    folder: Path, build: ExampleBuilder, tmp_path: Path
):
    ours = open_index(folder)
    last = len(ours.shards) - 1
    with served(folder) as server:
        tars = f"{server.url}/shard-{{000000..{last:06d}}}.tar"
        with pytest.raises(UserError, match="Give one with --out FOLDER"):
            index_folder(tars)
        index = index_folder(tars, tmp_path / "index")
        assert [shard.samples for shard in index.shards] == list(ours.shard_samples)
        assert index.seconds == pytest.approx(ours.seconds, abs=0.001 * CLIPS)
        assert not list((tmp_path / "index").glob("*.tar"))
        for number in range(len(ours.shards)):
            assert (index.table(number).starts == ours.table(number).starts).all()
        keys, refused = epoch(str(tmp_path / "index"), build, batch_seconds=31.0)
    assert (len(keys), refused) == (CLIPS, Counter())
    hasty, none = ReadPolicy(0, 1.0, 0.01), tmp_path / "none"
    with served(folder, lambda number: "drop" if number > 3 else "") as server:
        tars = f"{server.url}/shard-{{000000..{last:06d}}}.tar"
        with pytest.raises(UserError, match="cannot be indexed"):
            index_folder(tars, none, policy=hasty)
