"""Metrics against their formulas and against ir-measures on files; intervals and tests against known distributions."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from m3model.evaluation import compare_systems, holm, interval, per_query, write_qrels, write_run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ir_measures") is None, reason="ir-measures is not installed; pip install m3kernels[eval]"
)
MEASURES = ("nDCG@10", "R@100", "R@10", "RR@10", "Success@1", "AP")


def random_run(seed: int, queries: int = 40, passages: int = 60) -> tuple[dict, dict]:
    generator = np.random.default_rng(seed)
    qrels, run = {}, {}
    for query in range(queries):
        judged = generator.choice(passages, 8, replace=False)
        qrels[f"q{query}"] = {f"d{number}": int(generator.integers(0, 3)) for number in judged}
        listed = generator.choice(passages, int(generator.integers(0, 40)), replace=False)
        # Scores from a few values, so that ties are frequent.
        run[f"q{query}"] = {f"d{number}": float(generator.integers(0, 6)) / 4 for number in listed}
    return {query: rows for query, rows in run.items() if rows}, qrels


@pytest.mark.parametrize("seed", range(5))
def test_values_equal_ir_measures_on_the_exported_files(seed: int, tmp_path: Path) -> None:
    import ir_measures

    run, qrels = random_run(seed)
    write_run(run, tmp_path / "run", "s")
    write_qrels(qrels, tmp_path / "qrels")
    measured = per_query(run, qrels, MEASURES)
    parsed = [ir_measures.parse_measure(name) for name in MEASURES]
    read_qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels")))
    read_run = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    expected = ir_measures.calc_aggregate(parsed, read_qrels, read_run)
    for name, measure in zip(MEASURES, parsed):
        assert len(measured[name]) == len(qrels)
        assert np.mean(list(measured[name].values())) == pytest.approx(expected[measure], abs=1e-9)


def test_values_equal_the_formulas_by_hand() -> None:
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    qrels = {"q": {"b": 1, "c": 1, "z": 1}, "unanswered": {"a": 1}}
    values = per_query(run, qrels, ["nDCG@10", "RR@10", "R@10", "Success@1"])
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert values["nDCG@10"] == {"q": pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / ideal), "unanswered": 0.0}
    assert values["RR@10"]["q"] == 0.5
    assert values["R@10"]["q"] == pytest.approx(2 / 3)
    assert values["Success@1"]["q"] == 0.0


def test_ties_are_ranked_by_id_in_every_measure() -> None:
    values = per_query({"q": {"b": 1.0, "a": 1.0}}, {"q": {"a": 1}}, ["nDCG@10", "RR@10", "Success@1"])
    assert {name: rows["q"] for name, rows in values.items()} == {"nDCG@10": 1.0, "RR@10": 1.0, "Success@1": 1.0}


def test_unknown_measure_and_empty_judgements() -> None:
    with pytest.raises(ValueError, match="measure is 'nDCQ@10'"):
        per_query({"q": {"a": 1.0}}, {"q": {"a": 1}}, ["nDCQ@10"])
    with pytest.raises(ValueError, match="qrels is empty"):
        per_query({}, {}, ["AP"])


def test_interval_of_one_language_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).random(400)
    bounds = interval([values], samples=20_000)
    half = 1.96 * values.std() / 20
    assert bounds.mean == pytest.approx(values.mean())
    # The quantile of 20 000 samples has a standard error of about 2 % of the half width; the normal form fits to 3 %.
    assert bounds.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert bounds.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_of_languages_is_of_the_macro_mean() -> None:
    generator = np.random.default_rng(2)
    small, large = generator.random(50), generator.random(5000) * 0.1
    bounds = interval([small, large], samples=20_000)
    assert bounds.mean == pytest.approx((small.mean() + large.mean()) / 2)
    half = 1.96 * math.hypot(small.std() / 50**0.5, large.std() / 5000**0.5) / 2
    assert bounds.high - bounds.low == pytest.approx(2 * half, rel=0.1)
    with pytest.raises(ValueError, match=r"groups have \[50, 0\] values"):
        interval([small, []])


def test_coverage_of_the_interval_is_near_its_level() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        bounds = interval([generator.random(60), generator.random(60)], samples=400, seed=trial)
        covered += bounds.low <= 0.5 <= bounds.high
    # 190 expected; the binomial's standard deviation is 3.1, the bootstrap of 60 values is slightly narrow.
    assert 176 <= covered <= 199


def test_randomisation_test_is_exact_on_few_queries() -> None:
    # Four differences of one sign: 2 of the 16 sign patterns are as extreme.
    first = [{f"q{number}": 0.0 for number in range(4)}]
    second = [{f"q{number}": 0.1 * (number + 1) for number in range(4)}]
    result = compare_systems(first, second, samples=20_000)
    assert result.difference.mean == pytest.approx(0.25)
    assert result.p_value == pytest.approx(2 / 16, abs=0.01)
    assert compare_systems(first, first).p_value == 1.0
    assert compare_systems(second, first, samples=20_000).difference.mean == pytest.approx(-0.25)
    with pytest.raises(ValueError, match="different queries"):
        compare_systems(first, [{"q9": 1.0}])


def test_randomisation_test_finds_a_difference_that_is_there_only() -> None:
    generator = np.random.default_rng(4)
    base = [{str(q): value for q, value in enumerate(generator.random(200))} for _ in range(3)]
    noise = [{q: value + generator.normal(0, 0.05) for q, value in rows.items()} for rows in base]
    better = [{q: value + generator.normal(0.02, 0.05) for q, value in rows.items()} for rows in base]
    assert compare_systems(base, noise).p_value > 0.05
    assert compare_systems(base, better).p_value < 0.001


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
