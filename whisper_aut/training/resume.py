"""Which checkpoint a run goes on from, and whether it can.

In: what `--resume` was given, and the newest run of the name. Out: the path of a sound checkpoint, or None to begin anew. Next:
`training.train` hands it to the Trainer. A damaged checkpoint is said and passed over for the one before.
"""

from collections.abc import Callable
from pathlib import Path

import yaml

from whisper_aut.errors import UserError
from whisper_aut.training.checkpoint import (
    checkpoints_in,
    damage_of,
    is_checkpoint,
    newest_sound,
    read_manifest,
)
from whisper_aut.training.rundir import RunDirectory, is_first_rank

AUTO = "auto"


def resume_from(
    resume: str, newest: RunDirectory | None, place: str, warn: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint to go on from.

    Args:
        resume: empty, `auto`, a checkpoint, or a run directory.
        newest: the newest run of this name.
        place: where runs of this name lie, for messages.
        warn: told about each checkpoint that is passed over.

    Raises:
        UserError: there is no such checkpoint, none that is whole, or it is of a run of another name.
    """
    if not resume:
        return None
    if resume == AUTO:
        return newest_in(newest, warn) if newest and not newest.done.exists() else None
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        found = newest_in(RunDirectory(path), warn)
        if found is None:
            raise UserError(
                f"{path} has saved no checkpoint yet. Without --resume, the run begins anew."
            )
        _check_name(found, Path(place).name)
        return found
    if not is_checkpoint(path):
        kind = "is not a checkpoint" if path.exists() else "does not exist"
        raise UserError(
            f"There is no checkpoint {path}: it {kind}. Give a run directory, a step-….ckpt of {place}/…/checkpoints, or "
            "--resume auto."
        )
    if damage := damage_of(path, hashes=is_first_rank()):
        raise UserError(
            f"{path} is damaged: {damage}. --resume auto takes the newest one that is not."
        )
    _check_name(path.resolve(), Path(place).name)
    return path.resolve()


def _check_name(checkpoint: Path, name: str) -> None:
    """Refuse to train inside a run that another config began: it may be what others start from."""
    config = RunDirectory(checkpoint.parent.parent).config
    began = yaml.safe_load(config.read_text())["name"] if config.is_file() else name
    if began != name:
        raise UserError(
            f"{checkpoint} is of a run of {began!r}; this config trains {name!r}. To go on with that run, add name={began}; to begin "
            f"another from its weights, whisper-aut export {config.parent} --format whisper --out FOLDER and set model.path=FOLDER."
        )


def newest_in(run: RunDirectory, warn: Callable[[str], None]) -> Path | None:
    """Return the newest sound checkpoint of a run, None where it has saved none at all.

    Raises:
        UserError: all that there are are damaged.
    """
    # Contents are compared by the first rank alone; its choice is everyone's when the checkpoint is read.
    path, refused = newest_sound(run.checkpoints, hashes=is_first_rank())
    for line in refused:
        warn(line)
    if path is None and checkpoints_in(run.checkpoints):
        raise UserError(
            f"No checkpoint in {run.checkpoints} is whole:\n"
            + "\n".join(f"  - {line}" for line in refused)
        )
    return path.resolve() if path else None


def check_step_size(checkpoint: Path, batch_clips: int, ranks: int, accumulate: int) -> None:
    """Refuse to go on with steps of another size: its schedule and place in the data would mean something else.

    Raises:
        UserError: naming the accumulation that gives the same steps on these ranks, where there is one.
    """
    before, now = read_manifest(checkpoint).clips_per_step, batch_clips * ranks * accumulate
    if before in (0, now):  # 0: its steps were measured in seconds
        return
    micro_batch = batch_clips * ranks
    way = (
        f"set trainer.accumulate={before // micro_batch}"
        if before % micro_batch == 0
        else f"choose data.batch_clips and trainer.accumulate so that batch_clips × {ranks} × accumulate = {before}"
    )
    raise UserError(
        f"{checkpoint} was written by steps of {before} clips; this config makes steps of {now} ({batch_clips} clips × {ranks} "
        f"ranks × {accumulate} accumulated). To go on as before, {way}."
    )
