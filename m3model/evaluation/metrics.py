"""Effectiveness of a run per query, its mean over languages, confidence intervals and tests between systems.

Values come from ir-measures (MacAvaney et al. 2022), which wraps trec_eval; a query that was judged but not answered
counts 0. Uncertainty is that of drawing other queries from each language:

    macro mean      M = mean over languages of the mean over the language's queries
    interval        2.5 % and 97.5 % quantiles of M over bootstrap samples, queries drawn anew within each language
    p-value         share of random sign flips of the per-query differences with |M| at least as large as observed
                    (paired randomisation test, two-sided; Smucker et al. 2007), Holm's correction for several tests

Languages are resampled independently, also where their queries are translations of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3model.evaluation.tasks import Qrels, Run
from m3model.evaluation.trec import ranked

__all__ = ["Comparison", "Interval", "compare_systems", "holm", "interval", "per_query"]

PerQuery = dict[str, dict[str, float]]
"""{measure: {query id: value}}"""

Values = Sequence[float] | NDArray[np.float64]

_CHUNK = 4_000_000


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Difference of two systems' macro means (second minus first), its interval, and the p-value of no difference."""

    difference: Interval
    p_value: float


def per_query(run: Run, qrels: Qrels, measures: Sequence[str]) -> PerQuery:
    """The value of every measure for every judged query.

    Args:
        run: rankings; ties are resolved as in `m3model.evaluation.trec.ranked`.
        qrels: judgements; queries without any are not evaluated.
        measures: names that ir-measures knows, such as "nDCG@10", "R@100", "RR@10", "Success@1", "AP".

    Raises:
        ImportError: ir-measures is not installed.
        ValueError: an unknown measure, or no judgements.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError("metrics need ir-measures: pip install m3kernels[eval]") from error
    if not qrels:
        raise ValueError("qrels is empty; accepted: at least one judged query")
    parsed = {}
    for name in measures:
        try:
            parsed[ir_measures.parse_measure(name)] = name
        except (NameError, ValueError, TypeError, SyntaxError) as error:
            raise ValueError(f"measure is {name!r}; accepted: names of ir-measures such as nDCG@10") from error
    values: PerQuery = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    judged = {query: dict(relevances) for query, relevances in qrels.items()}
    asked = {query: ranked(run[query]) for query in judged if run.get(query)}
    for metric in ir_measures.iter_calc(list(parsed), judged, asked):
        values[parsed[metric.measure]][metric.query_id] = float(metric.value)
    return values


def interval(groups: Sequence[Values], *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Macro mean of the values of each group (language), with its bootstrap interval.

    Raises:
        ValueError: no group, an empty one, samples below 1 or confidence not between 0 and 1.
    """
    arrays = _arrays(groups)
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(f"samples is {samples}, confidence {confidence}; accepted: samples from 1, 0 < confidence < 1")
    generator = np.random.default_rng(seed)
    drawn = np.zeros(samples)
    for values in arrays:
        step = max(_CHUNK // len(values), 1)
        for begin in range(0, samples, step):
            count = min(step, samples - begin)
            chosen = generator.integers(0, len(values), (count, len(values)))
            drawn[begin : begin + count] += values[chosen].mean(1) / len(arrays)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(_macro(arrays), float(low), float(high))


def compare_systems(
    first: Sequence[Mapping[str, float]],
    second: Sequence[Mapping[str, float]],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Test whether the second system's macro mean differs from the first's.

    Args:
        first, second: for each language {query id: value}, the same languages and queries in both.

    Raises:
        ValueError: languages or queries differ.
    """
    if len(first) != len(second) or any(left.keys() != right.keys() for left, right in zip(first, second)):
        raise ValueError("the systems were evaluated on different queries; accepted: the same queries for both")
    arrays = _arrays([[right[query] - left[query] for query in left] for left, right in zip(first, second)])
    observed = abs(_macro(arrays))
    generator = np.random.default_rng(seed)
    drawn = np.zeros(samples)
    for values in arrays:
        step = max(_CHUNK // len(values), 1)
        for begin in range(0, samples, step):
            count = min(step, samples - begin)
            signs = generator.integers(0, 2, (count, len(values)), dtype=np.int8) * np.int8(2) - np.int8(1)
            drawn[begin : begin + count] += signs @ values / len(values) / len(arrays)
    # Sums that differ only in the order of rounding count as equal to the observed one.
    extreme = int((np.abs(drawn) >= observed - 1e-12).sum())
    return Comparison(interval(arrays, samples=samples, seed=seed), (1 + extreme) / (1 + samples))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p-values that hold together at the level at which each was tested."""
    order = sorted(range(len(p_values)), key=lambda test: p_values[test])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, test in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[test]))
        corrected[test] = largest
    return corrected


def _arrays(groups: Sequence[Values]) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(list(values), dtype=np.float64) for values in groups]
    if not arrays or not all(len(values) for values in arrays):
        raise ValueError(
            f"groups have {[len(values) for values in arrays]} values; accepted: one group or more, none empty"
        )
    return arrays


def _macro(arrays: Sequence[NDArray[np.float64]]) -> float:
    return float(np.mean([values.mean() for values in arrays]))
