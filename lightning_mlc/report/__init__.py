"""The report of a run: tables and figures of the results before and after training."""

from lightning_mlc.report.plots import plot_cosines, plot_languages, save
from lightning_mlc.report.table import before_after_tables, write_table_csv

__all__ = ["before_after_tables", "plot_cosines", "plot_languages", "save", "write_table_csv"]
