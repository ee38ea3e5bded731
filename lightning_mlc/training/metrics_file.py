"""``metrics.csv``, to which a resumed run appends."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lightning_mlc.errors import UserError
from lightning_mlc.files.atomic import write_whole
from lightning_mlc.lightning_internals import MetricsLoggerHooks, MetricsWriterHooks

METRICS = MetricsWriterHooks.NAME_METRICS_FILE
"""The name of the file in the folder of a run."""


class MetricsFile(MetricsLoggerHooks):
    """Lightning's CSV logger with a fixed folder, which writes each row at once.

    Lightning's own deletes the file of an earlier run in the same folder. It keeps up to a hundred steps in memory,
    which are lost if the process is killed.
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
            reason = error.strerror or type(error).__name__
            raise UserError(
                "out",
                f"cannot write {Path(self.log_dir) / METRICS} ({reason}); training stopped, but the checkpoints "
                "are intact: free some space and continue with --ckpt_path last",
            ) from error

    @rank_zero_only
    def continue_from(self, steps: int) -> None:
        """Drop the rows of optimizer steps (from 0) that a run repeats when it resumes after ``steps`` of them."""
        writer = self.experiment
        assert isinstance(writer, _Writer)
        writer.continue_from(steps)


class _Writer(MetricsWriterHooks):
    def continue_file(self) -> None:
        """Use the columns of the file, if it exists."""
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
