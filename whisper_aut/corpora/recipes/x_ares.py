"""The X-ARES tars, which are published as shards, so there is nothing to build.

`conf/probe_tasks/xares_*.yaml` name the Zenodo records and the folder of each task.
"""

from pathlib import Path

from whisper_aut.corpora.recipes.base import Recipe, Rows
from whisper_aut.errors import UserError


def _rows(raw: Path) -> Rows:
    found = sorted({path.parent.name for path in raw.rglob("*.tar")})
    there = f" {raw} has tars of {', '.join(found)}." if found else ""
    raise UserError(
        f"X-ARES's tars are shards already: nothing has to be built.{there} Score on them with "
        f"--root {raw} --tasks xares_esc50 …, look at them with: whisper-aut data inspect "
        f"{raw}/TASK"
    )


RECIPES = (
    Recipe(
        name="x-ares",
        title="X-ARES, 22 probe tasks",
        domain="",
        task="",
        licence="by task",
        source="https://github.com/jimbozhang/xares",
        rows=_rows,
        manual_steps=(
            "Each task is a record of Zenodo, named as `source` in conf/probe_tasks/xares_*.yaml. "
            "Download its zip and unpack it into the folder under the name in the YAML; nothing "
            "has to be built."
        ),
    ),
)
