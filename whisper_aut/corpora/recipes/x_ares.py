"""The X-ARES tars, which are shards as published, so there is nothing to build.

The configs `conf/probe_tasks/xares_*.yaml` name the Zenodo records and the folder of each task.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.base import Recipe
from whisper_aut.errors import UserError


def rows(raw: Path) -> Iterator[dict[str, Any]]:
    """Raise an error that says how to use the tars.

    Raises:
        UserError: always.
    """
    found = sorted({path.parent.name for path in raw.rglob("*.tar")})
    there = f" There are tars of {', '.join(found)}." if found else ""
    raise UserError(
        f"X-ARES's tars are shards as they are: nothing has to be built.{there} Score on them with "
        f"--root {raw} --tasks xares_esc50 …, look at them with: whisper-aut data inspect "
        f"{raw}/TASK"
    )
    yield {}


RECIPE = Recipe(
    name="x-ares",
    title="X-ARES, 22 probe tasks",
    domain="",
    task="",
    licence="by task",
    source="https://github.com/jimbozhang/xares",
    rows=rows,
    by_hand=(
        "Each task is a record of Zenodo, named as `source` in conf/probe_tasks/xares_*.yaml. "
        "Fetch its zip and unpack it into the folder under the name that the YAML expects; nothing "
        "has to be built."
    ),
)
