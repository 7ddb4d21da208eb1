"""Why a passage fits a query: what each token weighs, which tokens are shared, which passage row each query row found.

dense          one number, the inner product
sparse         Σ over shared tokens of query weight · passage weight; a token's weight is its largest in the text
multi_vector   mean over query rows i of max over passage rows j of similarity[i, j]
"""

from __future__ import annotations

import html
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from m3model.scoring import DEFAULT_WEIGHTS, score_embeddings

if TYPE_CHECKING:
    from rich.text import Text

    from m3model.model import M3Model

__all__ = ["Explanation", "SharedToken", "explain", "to_html", "to_png", "to_text"]

Scores = NDArray[np.float32]
_MOST_COLUMNS = 240


@dataclass(frozen=True)
class SharedToken:
    """A token of both texts and what it adds to the sparse score."""

    token: str
    query_weight: float
    passage_weight: float

    @property
    def product(self) -> float:
        return self.query_weight * self.passage_weight


@dataclass(frozen=True)
class Explanation:
    """Tokens and scores of one query and one passage.

    Attributes:
        query_tokens, passage_tokens: as the model reads them, special tokens and prefix included.
        query_weights, passage_weights: [Lq], [Lp] of every token; 0 for special tokens.
        shared: tokens of both texts, the largest product first.
        similarity: [Lq - 1, Lp - 1] of multi-vector rows; they leave out the first token of each text.
        scores: as M3Model.score.
    """

    query_tokens: list[str]
    passage_tokens: list[str]
    query_weights: Scores
    passage_weights: Scores
    shared: list[SharedToken]
    similarity: Scores
    scores: dict[str, float]

    @property
    def best(self) -> NDArray[np.int64]:
        """For each query row the passage row that it found; the first of equal ones."""
        found: NDArray[np.int64] = self.similarity.argmax(axis=1)
        return found

    def passage_matches(self) -> Scores:
        """For each passage token the largest similarity with which a query row found it; 0 if none did."""
        matched = np.zeros(len(self.passage_tokens), dtype=np.float32)
        for row, column in enumerate(self.best):
            matched[column + 1] = max(matched[column + 1], self.similarity[row, column])
        return matched


def explain(
    model: M3Model,
    query: str,
    passage: str,
    *,
    weights: tuple[float, float, float] = DEFAULT_WEIGHTS,
    max_length: int = 8192,
) -> Explanation:
    """Encode both texts and compare them token by token.

    Raises:
        TypeError, ValueError: as M3Model.encode and M3Model.score; a text without any token beside the first.
    """
    sides = [_encode(model, query, "query", max_length), _encode(model, passage, "passage", max_length)]
    (query_tokens, query_weights, asked), (passage_tokens, passage_weights, answered) = sides
    if min(len(query_tokens), len(passage_tokens)) < 2:
        raise ValueError("query and passage must each have a token besides the first")
    assert asked.multi_vector is not None and answered.multi_vector is not None
    similarity = (asked.multi_vector.rows.float() @ answered.multi_vector.rows.float().T).numpy()
    lexical = [side.sparse.to_dicts()[0] for side in (asked, answered)]
    assert model.tokenizer is not None
    shared = [
        SharedToken(model.tokenizer.token(token), weight, lexical[1][token])
        for token, weight in lexical[0].items()
        if token in lexical[1]
    ]
    scores = score_embeddings(asked, answered, weights=weights)
    return Explanation(
        query_tokens,
        passage_tokens,
        query_weights,
        passage_weights,
        sorted(shared, key=lambda entry: -entry.product),
        similarity,
        {name: float(score[0, 0]) for name, score in scores.items()},
    )


def to_text(explanation: Explanation) -> Text:
    """Both texts for a terminal: the background of a query token shows its weight, of a passage token its match."""
    from rich.text import Text

    lines = Text()
    scores = "   ".join(f"{name} {score:.4f}" for name, score in explanation.scores.items())
    lines.append(scores + "\n\n", style="bold")
    shares = _share(explanation.query_weights)
    lines.append("query, by token weight\n", style="dim")
    for token, share in zip(explanation.query_tokens, shares):
        lines.append(_shown(token), style=_terminal_style(share, (214, 96, 20)))
    lines.append("\n\npassage, by similarity to the query token that found it\n", style="dim")
    for token, share in zip(explanation.passage_tokens, np.maximum(explanation.passage_matches(), 0)):
        lines.append(_shown(token), style=_terminal_style(share, (24, 110, 190)))
    lines.append("\n\nshared tokens: query weight × passage weight\n", style="dim")
    for entry in explanation.shared[:20]:
        numbers = f"{entry.query_weight:.3f} × {entry.passage_weight:.3f} = {entry.product:.4f}"
        lines.append(f"{_shown(entry.token).strip() or entry.token:>20}  {numbers}\n")
    if not explanation.shared:
        lines.append("none\n")
    lines.append("\nquery token → passage token it found\n", style="dim")
    for row, column in enumerate(explanation.best):
        found = f"{_shown(explanation.passage_tokens[column + 1]).strip()} ({column + 1})"
        name = _shown(explanation.query_tokens[row + 1]).strip()
        lines.append(f"{name:>20}  {explanation.similarity[row, column]:.3f}  {found}\n")
    return lines


def to_png(explanation: Explanation) -> bytes:
    """The heat map of similarities with the tokens on its axes, as a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the heat map needs matplotlib: pip install m3kernels[eval]") from error
    columns = _columns(explanation)
    values = explanation.similarity[:, columns]
    figure = Figure(figsize=(3 + 0.22 * values.shape[1], 2 + 0.24 * values.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_yticks(range(values.shape[0]), [_shown(token) for token in explanation.query_tokens[1:]], fontsize=8)
    labels = [_shown(explanation.passage_tokens[column + 1]) for column in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=90, fontsize=8)
    place = {column: number for number, column in enumerate(columns)}
    rows = range(values.shape[0])
    axes.scatter([place[column] for column in explanation.best], rows, marker="s", s=26, color="none", edgecolors="red")
    axes.set(title=f"multi-vector {explanation.scores['multi_vector']:.4f}", xlabel="passage", ylabel="query")
    figure.colorbar(image, ax=axes, fraction=0.03)
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=110)
    return stored.getvalue()


def to_html(explanation: Explanation) -> str:
    """One page without any other file: coloured tokens, shared tokens, heat map; a query token points at its match."""
    matches = explanation.passage_matches()
    query = _spans(
        "q", explanation.query_tokens, _share(explanation.query_weights), "214,96,20", explanation.query_weights
    )
    passage = _spans("p", explanation.passage_tokens, np.maximum(matches, 0), "24,110,190", matches)
    shared = "".join(
        f"<tr><td>{html.escape(_shown(entry.token))}</td><td>{entry.query_weight:.4f}</td>"
        f"<td>{entry.passage_weight:.4f}</td><td>{entry.product:.4f}</td></tr>"
        for entry in explanation.shared
    )
    scores = "".join(f"<dt>{name}</dt><dd>{score:.4f}</dd>" for name, score in explanation.scores.items())
    best = json.dumps({str(row + 1): int(column + 1) for row, column in enumerate(explanation.best)})
    return (
        _PAGE.replace("@SCORES@", scores)
        .replace("@QUERY@", query)
        .replace("@SHARED@", shared or '<tr><td colspan="4">none</td></tr>')
        .replace("@HEATMAP@", _heat_map(explanation))
        .replace("@BEST@", best)
        .replace("@PASSAGE@", passage)
    )


def _encode(
    model: M3Model, text: str, role: Literal["query", "passage"], max_length: int
) -> tuple[list[str], Scores, Any]:
    """Tokens, the weight of each, and the embeddings of one text."""
    token_ids, offsets = model.tokenize([text], max_length, role=role)
    assert model.tokenizer is not None
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden = model.backbone(token_ids, offsets, len(token_ids))
            out = model.heads(hidden, token_ids, offsets)
            head = model.sparse_linear
            values = torch.relu(hidden @ head.weight[0] + head.bias).float()
    finally:
        model.train(training)
    ignored = torch.tensor(model.config.ignored_token_ids, dtype=token_ids.dtype, device=token_ids.device)
    values = torch.where(torch.isin(token_ids, ignored), 0.0, values)
    names = [model.tokenizer.token(token) for token in token_ids.tolist()]
    return names, values.cpu().numpy(), out


def _shown(token: str) -> str:
    return token.replace("▁", " ").replace("\n", "⏎") or token


def _share(weights: Scores) -> Scores:
    return weights / max(float(weights.max()), 1e-9)


def _terminal_style(share: float, colour: tuple[int, int, int]) -> str:
    strength = min(max(float(share), 0.0), 1.0)
    if strength < 0.05:
        return ""
    red, green, blue = (int(strength * part) for part in colour)
    return f"white on rgb({red},{green},{blue})"


def _columns(explanation: Explanation) -> list[int]:
    """Passage rows that the heat map shows: all, or in a long passage those that a query row found."""
    count = explanation.similarity.shape[1]
    return list(range(count)) if count <= _MOST_COLUMNS else sorted(set(explanation.best.tolist()))


def _spans(side: str, tokens: list[str], shares: Scores, colour: str, values: Scores) -> str:
    return "".join(
        f'<span id="{side}{number}" style="background:rgba({colour},{min(max(share, 0.0), 1.0):.3f})"'
        f' title="{value:.4f}">{html.escape(_shown(token))}</span>'
        for number, (token, share, value) in enumerate(zip(tokens, shares.tolist(), values.tolist()))
    )


def _heat_map(explanation: Explanation) -> str:
    columns = _columns(explanation)
    names = [_shown(explanation.passage_tokens[column + 1]) for column in columns]
    head = "".join(f"<th><div>{html.escape(name)}</div></th>" for name in names)
    rows = []
    for row, best in enumerate(explanation.best):
        cells = []
        for column in columns:
            value = float(explanation.similarity[row, column])
            marked = ' class="best"' if column == best else ""
            strength = min(max(value, 0.0), 1.0)
            cells.append(f'<td{marked} style="background:rgba(24,110,190,{strength:.3f})" title="{value:.4f}"></td>')
        rows.append(f"<tr><th>{html.escape(_shown(explanation.query_tokens[row + 1]))}</th>{''.join(cells)}</tr>")
    return f'<table id="heatmap"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>m3 explain</title><style>
body { font: 16px/1.9 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
.text span { padding: .1rem .05rem; border-radius: 3px; white-space: pre-wrap } .found { outline: 3px solid #d62728 }
dl { display: flex; flex-wrap: wrap; gap: .2rem .6rem } dt { color: #5b6674 }
dd { margin: 0 1rem 0 0; font-weight: 700 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .1rem .5rem; text-align: right }
#heatmap { display: block; overflow-x: auto; max-width: 100% }
#heatmap td { padding: 0; min-width: 14px; height: 16px } #heatmap td.best { outline: 2px solid #d62728 }
#heatmap div { writing-mode: vertical-rl; font-weight: 400; text-align: left }
</style></head><body>
<h1>m3 explain</h1><dl>@SCORES@</dl>
<h2>Query</h2><p>Colour: token weight. Point at a token to see what it found in the passage.</p>
<p class="text" id="query">@QUERY@</p>
<h2>Passage</h2><p>Colour: similarity to the query token that found it.</p>
<p class="text" id="passage">@PASSAGE@</p>
<h2>Shared tokens</h2>
<table id="shared"><tr><th>token</th><th>query</th><th>passage</th><th>product</th></tr>@SHARED@</table>
<h2>Multi-vector similarity</h2><p>Rows: query, columns: passage; framed: the best of each row.</p>@HEATMAP@
<script>
const best = @BEST@;
for (const [row, column] of Object.entries(best)) {
  const token = document.getElementById("q" + row), found = document.getElementById("p" + column);
  token.addEventListener("mouseenter", () => { found.classList.add("found"); token.classList.add("found"); });
  token.addEventListener("mouseleave", () => { found.classList.remove("found"); token.classList.remove("found"); });
}
document.body.dataset.tokens = document.querySelectorAll(".text span").length;
</script></body></html>
"""
