"""What explain says of two texts against the model's own scores; its page in a headless browser."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from m3model import M3Model
from m3model.explanation import Explanation, explain, to_html, to_png, to_text

QUERY = "where is the river"
PASSAGE = "the river bridge <b>north</b> & the mountain"


@pytest.fixture(scope="module")
def explanation(model: M3Model) -> Explanation:
    return explain(model, QUERY, PASSAGE)


def test_parts_add_up_to_the_models_scores(model: M3Model, explanation: Explanation) -> None:
    scores = {name: float(score[0, 0]) for name, score in model.score([QUERY], [PASSAGE]).items()}
    assert explanation.scores == pytest.approx(scores, abs=1e-5)
    assert sum(entry.product for entry in explanation.shared) == pytest.approx(scores["sparse"], abs=1e-5)
    assert explanation.similarity.max(axis=1).mean() == pytest.approx(scores["multi_vector"], abs=1e-5)
    assert [entry.product for entry in explanation.shared] == sorted(
        (e.product for e in explanation.shared), reverse=True
    )


def test_token_weights_are_those_of_the_sparse_vector(model: M3Model, explanation: Explanation) -> None:
    lexical = model.encode([PASSAGE]).sparse
    assert lexical is not None and model.tokenizer is not None
    expected = {model.tokenizer.token(token): weight for token, weight in lexical.to_dicts()[0].items()}
    largest: dict[str, float] = {}
    for token, weight in zip(explanation.passage_tokens, explanation.passage_weights.tolist()):
        largest[token] = max(largest.get(token, 0.0), weight)
    assert {token: weight for token, weight in largest.items() if weight} == pytest.approx(expected, abs=1e-5)
    assert explanation.passage_weights[0] == explanation.passage_weights[-1] == 0.0


def test_matches_mark_the_passage_tokens_that_were_found(explanation: Explanation) -> None:
    matches = explanation.passage_matches()
    found = {int(column) + 1 for column in explanation.best}
    assert set(np.flatnonzero(matches)) <= found and matches[0] == 0.0
    assert matches.max() == pytest.approx(explanation.similarity.max())


def test_terminal_text_names_tokens_and_scores(explanation: Explanation) -> None:
    text = to_text(explanation).plain
    assert f"all {explanation.scores['all']:.4f}" in text
    for entry in explanation.shared:
        assert f"= {entry.product:.4f}" in text


def test_png_is_an_image(explanation: Explanation) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed; pip install m3kernels[eval]")
    assert to_png(explanation).startswith(b"\x89PNG")


def test_texts_without_tokens_are_refused(model: M3Model) -> None:
    with pytest.raises(TypeError, match="must be a string"):
        explain(model, None, PASSAGE)  # type: ignore[arg-type]


def test_page_works_in_a_headless_browser(explanation: Explanation, tmp_path: Path) -> None:
    page = to_html(explanation)
    assert "<b>" not in page and not re.search(r"(src|href)=|url\(|@import", page)
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = (tmp_path / "page.html").as_uri()
    done = subprocess.run([browser, *options, "--dump-dom", address], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    count = len(explanation.query_tokens) + len(explanation.passage_tokens)
    # Written by the page's script, after it has found the two tokens of every pair.
    assert f'data-tokens="{count}"' in done.stdout
    rows, columns = explanation.similarity.shape
    heat_map = done.stdout.split('id="heatmap"')[1].split("</table>")[0]
    assert heat_map.count("<td") == rows * columns and heat_map.count('class="best"') == rows
