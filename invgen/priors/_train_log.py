"""The CSV log of a training run."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from invgen.checkpoints import atomic


class CsvLog:
    """Rows of a run in a CSV file; rows a killed run wrote after its last checkpoint are dropped, for they come again.

    Args:
        path: the file. history: rows of the run so far.
    """

    def __init__(self, path: str, history: Sequence[dict[str, float]]) -> None:
        self.path, self.columns, self.written, self.failed = Path(path), list[str](), 0, False
        self.write(history)

    def write(self, history: Sequence[dict[str, float]]) -> None:
        """Bring the file up to date: append, or write anew where a column or a value of an old row is new."""
        columns = list(dict.fromkeys(name for row in history for name in row))
        anew = columns != self.columns or self.written != len(history) - 1
        self.columns, self.written = columns, len(history)
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        if anew:
            table.writeheader()
        for row in history if anew else history[-1:]:
            table.writerow({k: int(v) if k == "step" else f"{v:.7g}" for k, v in row.items()})
        try:
            if anew:
                with atomic(self.path) as partial:
                    partial.write_text(text.getvalue(), encoding="utf-8")
            else:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(text.getvalue())
        except OSError as error:
            self.written = -1  # write all of it at the next chance
            if not self.failed:
                warnings.warn(
                    f"Cannot write the log {self.path}: {error.strerror or error}. Training goes on.", stacklevel=4
                )
            self.failed = True
