"""HTML report on training runs, with results, training curves, images and config differences."""

from senet_transfer.analysis.report.page import write_report
from senet_transfer.analysis.report.run_folder import Run, find_runs, load_run, load_runs

__all__ = ["Run", "find_runs", "load_run", "load_runs", "write_report"]
