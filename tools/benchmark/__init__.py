"""Paired benchmarks, for developers; ``tools/benchmark.py`` is the command line.

The folder is not part of the wheel. A script in ``tools/`` imports it as ``benchmark``: Python puts
the script's folder first in ``sys.path``, and a package precedes a module of the same name.
"""

from benchmark.compare import Comparison, Ratio, compare
from benchmark.memory import peak_bytes, saved_bytes

__all__ = ["Comparison", "Ratio", "compare", "peak_bytes", "saved_bytes"]
