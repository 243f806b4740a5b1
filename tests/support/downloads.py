"""An HTTP server on this machine, archives to download from it, and unpacked corpora."""

import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index


def serve(server: ThreadingHTTPServer) -> None:
    """Answer requests in a thread, which `shutdown` ends within 10 ms instead of half a second."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()


class Server(ThreadingHTTPServer):
    """Serves `files`; with `cut` set, every answer ends after `cut` bytes; without `ranges` it
    ignores Range.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.ranges = files, 0, True
        self.asked: list[str] = []
        serve(self)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        asked = self.headers.get("Range", "")
        self.server.asked.append(asked)
        if name not in self.server.files:
            return self.send_error(404)
        body = self.server.files[name]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            return self.end_headers()
        self.send_response(206 if asked and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + self.server.cut] if self.server.cut else body[start:])
        return None

    def log_message(self, *_: object):
        pass


def tar_of(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = (
                (len(body) if kind == tarfile.REGTYPE else 0),
                kind,
                "/etc/passwd",
            )
            tar.addfile(info, io.BytesIO(body))
    return path


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return path


def csv(*rows: str) -> bytes:
    return "\n".join(rows).encode()


def lay_out(root: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


def samples(folder: Path) -> list[Sample]:
    return [
        item for item in iter_samples(open_index(folder), ClipLimits()) if isinstance(item, Sample)
    ]
