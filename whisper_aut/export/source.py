"""A run or a checkpoint that a user names → the checkpoint file and where its run started.

In: a run directory, `…/latest`, or a `step-….ckpt` in one. Out: both. Next: `export.hf`.
"""

import json
from pathlib import Path

from whisper_aut.errors import UserError
from whisper_aut.model.start import Start
from whisper_aut.training.checkpoint import is_checkpoint
from whisper_aut.training.rundir import RunDirectory


def find_checkpoint(path: Path) -> tuple[Path, Start]:
    """Return the checkpoint to export and the start of its run.

    Raises:
        UserError: not a run or a checkpoint in one, or a run that has saved none yet.
    """
    named = path.is_file() or is_checkpoint(path)
    run = RunDirectory(path.parent.parent if named else path)
    facts = run.environment
    if not facts.exists():
        raise UserError(
            f"{path} is neither a run directory nor a checkpoint in one. Runs lie under "
            "runs/NAME/; runs/NAME/latest is the newest."
        )
    checkpoint = path if named else run.last_checkpoint
    if not checkpoint.exists():
        raise UserError(
            f"{run.path} has saved no checkpoint yet ({checkpoint.relative_to(run.path)} is missing)."
        )
    start = json.loads(facts.read_text())["start"]
    return checkpoint, Start(start["path"], start["revision"])
