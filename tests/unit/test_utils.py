"""Locks, atomic writes, JSON and the parallel map."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from whisper_aut.errors import UserError
from whisper_aut.utils import (
    atomic_path,
    file_lock,
    parallel_map,
    progress_bar,
    read_json,
    write_json,
)


def _make(place: Path, made: Path, die: bool) -> None:
    with file_lock(place):
        if die:
            os._exit(1)
        if not place.exists():
            time.sleep(0.2)
            place.mkdir()
            with made.open("a") as file:
                file.write("made\n")


def _run(place: Path, made: Path, dying: int, working: int) -> None:
    fork = multiprocessing.get_context("fork")
    makers = [
        fork.Process(target=_make, args=(place, made, number < dying))
        for number in range(dying + working)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(timeout=20)
        assert maker.exitcode is not None, "a process waits for ever"


def test_one_makes_it_and_the_others_find_it(tmp_path: Path):
    place, made = tmp_path / "new" / "thing", tmp_path / "made"
    _run(place, made, dying=0, working=4)
    assert made.read_text() == "made\n"


def test_a_process_that_dies_releases_its_lock(tmp_path: Path):
    place, made = tmp_path / "thing", tmp_path / "made"
    _run(place, made, dying=2, working=2)
    assert made.read_text() == "made\n"


# Lustre without `-o flock` answers ENOSYS.
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_an_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reason = os.strerror(number)

    def flock(*_: object) -> None:
        raise OSError(number, reason)

    monkeypatch.setattr("fcntl.flock", flock)
    message = rf"{tmp_path} does not support file locks \({reason}\)"
    with pytest.raises(UserError, match=message), file_lock(tmp_path / "x"):
        pass


def _square(number: int) -> int:
    if number == 13:
        os._exit(1)
    return number * number


@pytest.mark.parametrize("workers", [1, 2])
def test_a_parallel_map_keeps_the_order_of_a_long_generator(workers: int):
    assert list(parallel_map(_square, iter(range(12)), workers)) == [n * n for n in range(12)]


def test_a_worker_that_dies_is_a_user_error():
    with pytest.raises(UserError, match=r"A worker process died.*Leave it out"):
        list(parallel_map(_square, range(20), 2, on_crash="Leave it out."))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"ä": 1})
    with pytest.raises(UnicodeError), atomic_path(path) as partial:
        partial.write_text("half \udcff", encoding="utf-8")
    assert read_json(path) == {"ä": 1}
    assert list(path.parent.iterdir()) == [path]


def test_json_keeps_file_names_that_are_not_utf8(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9.flac")
    write_json(tmp_path / "x.json", {name: "ä"})
    assert read_json(tmp_path / "x.json") == {name: "ä"}


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_a_user_error(tmp_path: Path, content: bytes):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_brackets_in_a_progress_bar_are_not_markup():
    bar = progress_bar()
    bar.add_task("embed [/a] [b]")
    assert str(bar.columns[0].render(bar.tasks[0])) == "embed [/a] [b]"
