"""A report of training runs as a single HTML page: results, curves, images and config changes."""

from senet_transfer.analysis.report.page import write_report
from senet_transfer.analysis.report.run_folder import Run, find_runs, load_run, load_runs

__all__ = ["Run", "find_runs", "load_run", "load_runs", "write_report"]
