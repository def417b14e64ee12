"""Paired benchmarks for developers. The command is ``tools/benchmark.py``.

This folder is not part of the wheel. Scripts in ``tools/`` import it as ``benchmark``, because
Python puts a script's folder first in ``sys.path`` and prefers a package to a module of the same
name.
"""

from benchmark.compare import Comparison, Ratio, compare
from benchmark.memory import peak_bytes, saved_bytes

__all__ = ["Comparison", "Ratio", "compare", "peak_bytes", "saved_bytes"]
