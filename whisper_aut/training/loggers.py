"""Names in a config → Lightning's loggers, all of which write below the run directory.

In: `trainer.loggers` and the run. Out: loggers. Next: the Trainer. A metric is logged once and reaches all of them. Weights &
Biases writes offline unless `WANDB_MODE=online` says otherwise (`wandb sync` sends it later); MLflow writes into the run unless
`MLFLOW_TRACKING_URI` names a server. Their packages are extras, and a config that names one is refused before anything is
loaded (`settings`).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)


def _wandb(run: Path, name: str) -> Logger:
    offline = os.environ.get("WANDB_MODE", "offline") != "online"
    return WandbLogger(name=run.name, project=name, save_dir=run, offline=offline)


def _mlflow(run: Path, name: str) -> Logger:
    place = run.absolute()  # a file of SQLite: MLflow has given up its plain folders
    server = os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{place / 'mlflow.db'}"
    return MLFlowLogger(
        name, run_name=run.name, tracking_uri=server, artifact_location=(place / "mlruns").as_uri()
    )


BUILDERS: dict[str, Callable[[Path, str], Logger]] = {
    # Rows are kept in memory for 100 steps otherwise, which a killed run would lose.
    "csv": lambda run, _: CSVLogger(run, name="", version="logs", flush_logs_every_n_steps=1),
    "tensorboard": lambda run, _: TensorBoardLogger(run, name="", version="tensorboard"),
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def build_loggers(names: Sequence[str], run: Path, name: str) -> list[Logger]:
    """Return a logger for each name.

    Args:
        names: keys of `BUILDERS`.
        run: the run directory.
        name: the config's; projects and experiments are called by it.
    """
    return [BUILDERS[one](run, name) for one in names]
