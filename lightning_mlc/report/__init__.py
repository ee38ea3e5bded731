"""What a run leaves for its user to look at: tables and pictures of before and after."""

from lightning_mlc.report.plots import plot_cosines, plot_languages, save
from lightning_mlc.report.table import before_after_tables, write_table_csv

__all__ = ["before_after_tables", "plot_cosines", "plot_languages", "save", "write_table_csv"]
