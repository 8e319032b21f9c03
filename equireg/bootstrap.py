"""Bootstrap intervals."""

import warnings

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval_of_mean(values: np.ndarray) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean of (n,) values: BCa, or percentiles where BCa is not defined.

    None for a single value. The same values always give the same interval.
    """
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # scipy warns where BCa is not defined, and answers NaN
            interval = stats.bootstrap(
                (values,),
                np.mean,
                confidence_level=CONFIDENCE,
                method=method,
                batch=1000,  # bounds the memory of large runs
                rng=np.random.default_rng(0),
            ).confidence_interval
        if np.isfinite(interval).all():
            break
    return float(interval.low), float(interval.high)
