"""Perplexity, and how sure a figure is: the bootstrap over documents that evaluate and tools.compare share."""

import math
from functools import cache, lru_cache

import numpy as np
from scipy import stats

DRAWS = 10_000
MAX_LOG = 700.0  # of what exp() can take


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token, kept finite."""
    return math.exp(min(loss, MAX_LOG))


@lru_cache(maxsize=4)  # 40 MB of a thousand rows
def draws(rows: int) -> np.ndarray:
    """How often each row is in each of DRAWS resamples: (DRAWS, rows) float32."""
    return stats.multinomial.rvs(rows, np.full(rows, 1 / rows), size=DRAWS, random_state=0).astype(np.float32)


@lru_cache(maxsize=32)
def resampled(value: bytes) -> np.ndarray:
    """(DRAWS,) sums of float32 values in each resample: weights are those of other runs, totals of other weights."""
    values = np.frombuffer(value, np.float32)
    return draws(len(values)) @ values


@cache
def levels(rows: int) -> list[float]:
    """The quantiles of a 95 % bootstrap percentile interval, expanded for few rows as a t interval is.

    Source: T. Hesterberg, "What Teachers Should Know About the Bootstrap" (2015): the expanded percentile interval.
    """
    tail = float(stats.norm.cdf(math.sqrt(rows / (rows - 1)) * stats.t.ppf(0.025, rows - 1)))
    return [tail, 1 - tail]


def interval(total: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """95 % interval of sum(total) / sum(weight) over resampled rows; of two or more.

    Args:
        total: (rows,) nats of a document or run of documents; of two models on the same rows, their
            difference: that makes it a paired bootstrap.
        weight: (rows,) what the nats are counted by: bytes or tokens.
    """
    rows = len(weight)
    total, weight = (resampled(values.astype(np.float32).tobytes()) for values in (total, weight))
    low, high = np.quantile(total / weight, levels(rows))
    return float(low), float(high)
