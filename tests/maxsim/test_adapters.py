"""The padded adapters equal the formulas of PyLate 1.6 and FlagEmbedding 1.4, for masks of any pattern."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3kernels.maxsim.adapters import colbert_kd_scores, colbert_score, colbert_scores, colbert_scores_pairwise


def plain_scores(queries: Tensor, documents: Tensor, queries_mask: Tensor, documents_mask: Tensor) -> Tensor:
    """Similarities times the masks, maximum, sum: what PyLate computes. documents [Nq or 1, Nd, Ld, E]."""
    similarities = torch.einsum("ash,abth->abst", queries, documents.expand(len(queries), *documents.shape[1:]))
    similarities = similarities * queries_mask[:, None, :, None] * documents_mask[:, :, None, :]
    return similarities.amax(-1).sum(-1)


def random_padded(seed: int, width: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(3, 5, width, generator=generator)
    documents = torch.randn(3, 4, 7, width, generator=generator)
    queries_mask = torch.rand(3, 5, generator=generator) < 0.7
    documents_mask = torch.rand(3, 4, 7, generator=generator) < 0.6
    documents_mask[0, 0] = True
    documents_mask[0, 1] = False
    return queries, documents, queries_mask, documents_mask


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), width=st.integers(1, 20), as_float=st.booleans())
def test_scores_with_masks_of_any_pattern_equal_the_plain_formula(seed: int, width: int, as_float: bool) -> None:
    queries, documents, queries_mask, documents_mask = random_padded(seed, width)
    if as_float:
        queries_mask, documents_mask = queries_mask.float(), documents_mask.float()
    expected = plain_scores(queries, documents[:1], queries_mask.float(), documents_mask[:1].float())
    found = colbert_scores(queries, documents[0], queries_mask, documents_mask[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    expected = plain_scores(queries, documents, queries_mask.float(), documents_mask.float())
    found = colbert_kd_scores(queries, documents, queries_mask, documents_mask)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_masked_rows_can_be_left_out_of_the_maximum() -> None:
    query = torch.tensor([[[1.0, 0.0]]])
    document = torch.tensor([[[9.0, 0.0], [-2.0, 0.0], [-3.0, 0.0]]])
    mask = torch.tensor([[0, 1, 1]])
    assert colbert_scores(query, document, documents_mask=mask).tolist() == [[0.0]]
    assert colbert_scores(query, document, documents_mask=mask, masked_as_zero=False).tolist() == [[-2.0]]


def test_without_masks_nothing_is_counted_as_zero() -> None:
    query, document = torch.ones(1, 2, 8), -torch.ones(1, 3, 8)
    assert colbert_scores(query, document).tolist() == [[-16.0]]


def test_pairwise_scores_lists_of_texts_of_different_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(n, 24, generator=generator) for n in (3, 5, 1)]
    documents = [torch.randn(n, 24, generator=generator) for n in (9, 2, 4)]
    expected = torch.stack([(q @ d.T).amax(1).sum() for q, d in zip(queries, documents)])
    torch.testing.assert_close(colbert_scores_pairwise(queries, documents), expected)  # type: ignore[arg-type]
    torch.testing.assert_close(
        colbert_scores_pairwise([q.numpy() for q in queries], [d.numpy() for d in documents]), expected
    )


def test_flagembedding_score_is_the_mean_over_query_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    query, passage = torch.randn(6, 64, generator=generator), torch.randn(30, 64, generator=generator)
    torch.testing.assert_close(colbert_score(query.numpy(), passage.numpy()), (query @ passage.T).amax(1).mean())


def test_gradients_flow_to_kept_rows_only() -> None:
    queries, documents, queries_mask, documents_mask = random_padded(1, 8)
    leaves = queries.requires_grad_(), documents.requires_grad_()
    expected = torch.autograd.grad(
        plain_scores(queries, documents, queries_mask.float(), documents_mask.float()).square().sum(), leaves
    )
    found = torch.autograd.grad(
        colbert_kd_scores(queries, documents, queries_mask, documents_mask).square().sum(), leaves
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_bad_arguments_are_named() -> None:
    queries, documents, _, _ = random_padded(0, 8)
    with pytest.raises(ValueError, match="backend is 'flash'"):
        colbert_scores(queries, documents[0], backend="flash")
    with pytest.raises(ValueError, match=r"documents_mask has shape \(4, 6\); accepted: \(4, 7\)"):
        colbert_scores(queries, documents[0], documents_mask=torch.ones(4, 6))
    with pytest.raises(ValueError, match="documents_mask has values other than 0 and 1"):
        colbert_scores(queries, documents[0], documents_mask=torch.full((4, 7), 0.5))
    with pytest.raises(ValueError, match="queries_embeddings must have 3 dimensions"):
        colbert_scores(queries[0], documents[0])
    with pytest.raises(ValueError, match="candidates of 2 queries, but there are 3"):
        colbert_kd_scores(queries, documents[:2])
    with pytest.raises(ValueError, match="4 texts, but there are 3"):
        colbert_scores_pairwise(queries, documents[0])
