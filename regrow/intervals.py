"""95 % intervals of a mean over few repetitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

# Two-sided 95 % quantiles of Student's t by degrees of freedom; `_FAR` / degrees is what lies above the normal's beyond these.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL, _FAR = 1.960, 2.46


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t, to three digits; degrees >= 1."""
    return _T95[degrees - 1] if degrees <= len(_T95) else _NORMAL + _FAR / degrees


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of independent values by Student's t; None for fewer than two, which have none."""
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
