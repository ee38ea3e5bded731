"""``metrics.csv``, which a resumed run continues instead of beginning anew."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lightning_mlc.errors import UserError
from lightning_mlc.files.atomic import write_whole
from lightning_mlc.lightning_internals import MetricsLoggerHooks, MetricsWriterHooks

METRICS = MetricsWriterHooks.NAME_METRICS_FILE
"""Its name in a run's folder."""


class MetricsFile(MetricsLoggerHooks):
    """Lightning's CSV logger for a fixed folder, written row by row.

    Lightning's own deletes the file of an earlier run in the same folder, and keeps a hundred steps in memory that a
    killed process loses.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)

    def make_writer(self) -> _Writer:
        Path(self.root_dir).mkdir(parents=True, exist_ok=True)
        return _Writer(self.log_dir)

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            told = error.strerror or type(error).__name__
            raise UserError(
                "out",
                f"cannot write {Path(self.log_dir) / METRICS} ({told}); training stopped, the checkpoints are "
                "whole: make room and continue with --ckpt_path last",
            ) from error

    @rank_zero_only
    def continue_from(self, steps: int) -> None:
        """Drop rows of the optimizer steps (from 0) that a run makes again if it goes on after ``steps`` of them."""
        writer = self.experiment
        assert isinstance(writer, _Writer)
        writer.continue_from(steps)


class _Writer(MetricsWriterHooks):
    def continue_file(self) -> None:
        """Take over the columns of the file, if it exists."""
        if Path(self.metrics_file_path).is_file():
            with Path(self.metrics_file_path).open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def continue_from(self, steps: int) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            # A killed process may have left half a row at the end.
            rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and None not in row.values()]
        kept = io.StringIO(newline="")
        writer = csv.DictWriter(kept, fieldnames=self.metrics_keys)
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) < steps or steps == 0)
        write_whole(path, kept.getvalue())
