"""HTML page about a dataset: training inputs, statistics, duplicates and unusual annotations."""

from senet_transfer.analysis.dataset_page.page import write_data_page
from senet_transfer.analysis.dataset_page.splits import data_config

__all__ = ["data_config", "write_data_page"]
