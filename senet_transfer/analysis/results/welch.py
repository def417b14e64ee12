"""Welch's confidence interval for the difference between two means.

Welch's interval assumes independent, normally distributed values, but not equal variances. SciPy is
not a dependency of this package, so the quantile of Student's t distribution is computed here.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np

_CONFIDENCE = 0.95
_POINTS = 200_001


def t_quantile(freedom: float) -> float:
    """Return t such that a Student's t variable lies between -t and t with a probability of 95%.

    With x = sqrt(freedom) tan(a), the density is proportional to cos(a) ** (freedom - 1) for angles
    a from 0 to pi / 2, where it can be integrated numerically.

    Args:
        freedom: Degrees of freedom, 1 or more.
    """
    angles = np.linspace(0, math.pi / 2, _POINTS)
    density = np.cos(angles) ** (freedom - 1)
    total = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(_CONFIDENCE, total / total[-1], angles)
    return math.sqrt(freedom) * math.tan(angle)


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return mean(second) - mean(first) and half the width of its 95% confidence interval.

    The half width is NaN if either sample has fewer than two values.
    """
    shift = statistics.fmean(second) - statistics.fmean(first)
    if min(len(first), len(second)) < 2:
        return shift, math.nan
    errors = [statistics.variance(values) / len(values) for values in (first, second)]
    if sum(errors) == 0:
        return shift, 0.0
    terms = [
        error**2 / (len(values) - 1) for error, values in zip(errors, (first, second), strict=True)
    ]
    freedom = sum(errors) ** 2 / sum(terms)
    return shift, t_quantile(freedom) * math.sqrt(sum(errors))
