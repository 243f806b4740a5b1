"""Training jobs on several ranks, one after another."""

from pathlib import Path

import pytest

from tests.support.jobs import Jobs


@pytest.fixture
def jobs(tmp_path: Path, tiny_whisper: Path, tiny_shards: Path) -> Jobs:
    return Jobs(tmp_path, tiny_whisper, tiny_shards)
