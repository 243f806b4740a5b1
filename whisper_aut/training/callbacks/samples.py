"""Writes what the decoder says in validation beside the references: `samples.jsonl` in the run directory."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
from rich.console import Console
from rich.table import Table

SHOWN_PER_TASK = 2


class SampleWriter(lightning.Callback):
    """After each validation, appends the generated texts to a file; after the last, shows some of each task.

    Args:
        path: the JSON-lines file.
        console: where the last ones are shown.
    """

    def __init__(self, path: Path, console: Console):
        self.path, self.console = path, console
        self._last: list[dict[str, str]] = []

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not module.generated:
            return
        self._last = list(module.generated)
        with self.path.open("a") as file:
            for entry in module.generated:
                file.write(
                    json.dumps({"step": trainer.global_step, **entry}, ensure_ascii=False) + "\n"
                )

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if not self._last:
            return
        table = Table(title="What the decoder writes for validation clips", title_justify="left")
        columns = ("domain", "task", "reference", "generated")
        for column in columns:
            table.add_column(column, overflow="fold")
        shown: Counter[str] = Counter()
        for entry in self._last:
            shown[entry["task"]] += 1
            if shown[entry["task"]] <= SHOWN_PER_TASK:
                table.add_row(*(entry[column] for column in columns))
        self.console.print(table)
