"""Several processes that need one thing: one makes it, and a maker that dies does not block the others."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from whisper_aut.errors import UserError
from whisper_aut.locks import file_lock


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


def test_a_maker_that_dies_gives_its_turn_back(tmp_path: Path):
    place, made = tmp_path / "thing", tmp_path / "made"
    _run(place, made, dying=2, working=2)
    assert made.read_text() == "made\n"


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    with (
        pytest.raises(
            UserError, match=rf"{tmp_path} has no file locks \(Function not implemented\)"
        ),
        file_lock(tmp_path / "x"),
    ):
        pass
