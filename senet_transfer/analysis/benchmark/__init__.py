"""Side-by-side measurements; ``tools/benchmark.py`` is their command line."""

from senet_transfer.analysis.benchmark.compare import Comparison, Ratio, compare
from senet_transfer.analysis.benchmark.memory import peak_bytes, saved_bytes

__all__ = ["Comparison", "Ratio", "compare", "peak_bytes", "saved_bytes"]
