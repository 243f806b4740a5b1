"""Files from strangers: what SECURITY.md promises, tried on inputs made to break it.

Other files try the rest: `..`, links and bombs in archives of corpora (`corpora/test_download.py`),
mutated shards and pickles (`data/test_fuzz.py`), HTML in reports (`report/test_report_page.py`).
"""

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from whisper_aut.audio.decode import ClipLimits, load_file
from whisper_aut.cli import main
from whisper_aut.config import compose
from whisper_aut.corpora.build import read_clip
from whisper_aut.corpora.manifest import read_annotations, read_rows
from whisper_aut.data.filters import read_exclusions
from whisper_aut.data.reader import tar_members
from whisper_aut.data.shards import INDEX_NAME, open_index
from whisper_aut.data.writer import index_folder
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.export.card import update_card
from whisper_aut.inference.embed import Vectors
from whisper_aut.loading import open_encoder
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.probes.results import Scores
from whisper_aut.probes.tasks import load_task
from whisper_aut.training.checkpoint import MANIFEST, read_manifest
from whisper_aut.utils import read_json

DEEP = "[" * 100_000
HOSTILE = "<img src=x onerror=alert(1)>"


def save_vectors(path: Path) -> Path:
    save_file({"embeddings": torch.zeros(1, 2)}, path, metadata={"names": DEEP})
    return path


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: read_json(folder / "deep.json"),
        lambda folder: Scores.load(folder / "deep.json"),
        lambda folder: read_exclusions(folder / "deep.json"),
        lambda folder: read_annotations(folder / "deep.json"),
        lambda folder: open_index(folder),
        lambda folder: read_manifest(folder),
        lambda folder: Vectors.load(save_vectors(folder / "vectors.safetensors")),
    ],
    ids=["metadata", "scores", "exclusions", "annotations", "index", "checkpoint", "embeddings"],
)
def test_json_that_is_nested_too_deeply_is_an_error(read: Callable[[Path], object], tmp_path: Path):
    for name in ("deep.json", INDEX_NAME, MANIFEST):
        (tmp_path / name).write_text(DEEP)
    with pytest.raises(UserError):
        read(tmp_path)


def test_yaml_neither_nests_nor_multiplies_without_end(tmp_path: Path):
    nested = f"name: {'[' * 400}{']' * 400}\n"
    levels = (f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))  # 2^39 values
    path = tmp_path / "own.yaml"
    for text, message in (
        (nested, "nested too deeply|recursion"),
        (f"a0: &a0 [x]\n{''.join(levels)}name: *a39\n", "more than 100000 values"),
        ("name: &a [*a]\n", "more than 100000 values"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            compose(path)
        with pytest.raises(UserError, match=message):
            load_task(str(path), tmp_path)
    path.write_text("a: &a [1, 2]\nb: *a\n")
    assert compose(path) == {"a": [1, 2], "b": [1, 2]}  # anchors as such are allowed


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME], ids=["pax", "gnu"])
def test_an_extension_header_does_not_fill_memory(kind: bytes):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 4 << 30  # 4 GiB, which `tarfile` would read at once
    stream = io.BytesIO(header.tobuf() + bytes(10_240))
    with pytest.raises(tarfile.TarError, match="extension header has"):
        list(tar_members(stream))


def test_a_compressed_tar_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("whisper_aut.data.writer.MIN_ALLOWED_BYTES", 1 << 20)
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bytes(64 << 20), 1))
    with pytest.raises(UserError, match=r"bomb.tar.* times as large"):
        index_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.tar.gz"]


def test_a_line_of_a_compressed_manifest_does_not_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("whisper_aut.corpora.manifest.MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * (64 << 20), 1))
    with pytest.raises(UserError, match=r"Line 1 of .*bomb.jsonl.gz has more than 1048576 bytes"):
        list(read_rows(tmp_path / "bomb.jsonl.gz"))


def test_links_in_shards_are_not_followed(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("a.json")
            link.type, link.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(link)
        tar.add(tmp_path / "secret.txt", "../outside.txt")
    before = sorted(tmp_path.iterdir())
    with (tmp_path / "0.tar").open("rb") as stream:
        assert [member.name for _, member in tar_members(stream)] == ["../outside.txt"]
    assert open_index(tmp_path).samples == 1
    assert sorted(tmp_path.iterdir()) == before  # a name in a shard is a key, never a path


def test_devices_and_pipes_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", Path("/dev/zero"), tmp_path):
        for read in (load_file, read_clip):
            with pytest.raises(SkipSample, match="not a file"):
                read(path, ClipLimits())


@pytest.mark.parametrize(
    "name", ["http://169.254.169.254/x.tar", "s3://b/x.tar", "//host/x.tar", "/etc/x.tar", ".x.tar"]
)
def test_an_index_names_neither_servers_nor_other_folders(name: str, tmp_path: Path):
    index = {"version": 2, "shards": [{"name": name, "samples": 1}]}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="names files outside its folder"):
        open_index(tmp_path)


def test_models_do_not_bring_code(tiny_whisper: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_whisper, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert PretrainedWhisper(str(folder)).encoder  # transformers' own class, as the type says
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(UserError):
        open_encoder(str(folder), None)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)  # the trap is set correctly
    assert not (tmp_path / "ran").exists()


def test_names_do_not_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = "\x1b]0;owned\x07\x1b[2J\x9b31mclip"
    assert main(["embed", "missing", str(tmp_path / name), "--out", "x.safetensors"]) == 1
    (tmp_path / f"{name}.yaml").write_text("x: [")
    assert main(["train", str(tmp_path / f"{name}.yaml")]) == 1
    shown = "".join(capsys.readouterr())
    assert "␛[2J" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)


def test_names_that_are_not_utf_8_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["embed", "missing", str(tmp_path / "caf\udce9"), "--out", "x.safetensors"]) == 1
    assert "caf\\udce9" in capsys.readouterr().err


def test_names_are_not_html_on_a_model_card(tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# m\n\n## Probes\nNot probed.\n")
    entry = {"encoder": "m", "task": "t", "title": HOSTILE, "metric": "accuracy", "kind": "linear"}
    entry |= {"protocol": "strict", "final_fit": "train", "mean": 1, "std": None, "seeds": []}
    entry |= {"interval": [1, 1], "clips": {"test": 2}}
    text = update_card(tmp_path, [{"entries": [entry]}]).read_text()
    assert HOSTILE not in text.partition("## Probes")[2]
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
