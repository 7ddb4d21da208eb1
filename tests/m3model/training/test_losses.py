"""m3_loss against a transcription of the paper's formulas in float64, text by text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import SparseBatch, offsets_from_lengths
from m3model import M3Embeddings, MultiVectors
from m3model.training import m3_loss

WIDTH, VOCABULARY = 16, 24
HEADS = ("dense", "sparse", "multi_vector")


def leaves(seed: int, lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense rows, token weights with their ids (one set of ids for each text), multi-vector rows."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.nn.functional.normalize(torch.randn(len(lengths), WIDTH, generator=generator, dtype=dtype), dim=1)
    rows = torch.nn.functional.normalize(torch.randn(sum(lengths), WIDTH, generator=generator, dtype=dtype), dim=1)
    ids = [torch.randperm(VOCABULARY, generator=generator)[:length].sort().values for length in lengths]
    weights = 0.05 + 0.3 * torch.rand(sum(lengths), generator=generator, dtype=dtype)
    token_ids = torch.cat(ids).int()
    return dense.requires_grad_(), token_ids, weights.requires_grad_(), rows.requires_grad_()


def embeddings(parts: tuple[Tensor, ...], lengths: list[int], heads: tuple[str, ...] = HEADS) -> M3Embeddings[Any]:
    dense, ids, weights, rows = parts
    offsets = offsets_from_lengths(torch.tensor(lengths))
    return M3Embeddings(
        dense if "dense" in heads else None,
        SparseBatch(ids, weights, offsets) if "sparse" in heads else None,
        MultiVectors(rows, offsets) if "multi_vector" in heads else None,
    )


def plain_scores(queries: Any, passages: Any, query_lengths: list[int], passage_lengths: list[int], floor: bool) -> Any:
    """Every score by its definition: dense, sparse over a vocabulary axis, multi-vector pair by pair."""
    sides = []
    for parts, lengths in ((queries, query_lengths), (passages, passage_lengths)):
        dense, ids, weights, rows = parts
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        lexical = weights.new_zeros(len(lengths), VOCABULARY).index_put((owner, ids.long()), weights)
        sides.append((dense, lexical, rows.split(lengths)))
    (qd, ql, qr), (pd, pl, pr) = sides
    longest = max(passage_lengths)
    table = []
    for q in qr:
        line = []
        for p in pr:
            if not len(q) or not len(p):
                line.append(qd.new_zeros(()))
                continue
            best = (q @ p.T).max(1).values
            line.append((best.clamp_min(0) if floor and len(p) < longest else best).mean())
        table.append(torch.stack(line))
    return {"dense": qd @ pd.T, "sparse": ql @ pl.T, "multi_vector": torch.stack(table)}


def paper_loss(
    scores: dict[str, Tensor],
    group: int,
    distill: bool,
    temperature: float,
    weights: tuple[float, ...] = (1.0, 0.3, 1.0),
    loss_weights: tuple[float, ...] = (1.0, 0.1, 1.0),
) -> Tensor:
    s_d, s_l, s_m = (scores[head] / temperature for head in HEADS)
    w1, w2, w3 = weights
    l1, l2, l3 = loss_weights
    s_i = w1 * s_d + w2 * s_l + w3 * s_m
    target = s_i.detach().exp() / s_i.detach().exp().sum(1, keepdim=True)

    def info_nce(s: Tensor) -> Tensor:
        return torch.stack([-(s[b] - s[b].logsumexp(0))[b * group] for b in range(len(s))]).mean()

    def distilled(s: Tensor) -> Tensor:
        return -(target * (s - s.logsumexp(1, keepdim=True))).sum(1).mean()

    loss = (l1 * info_nce(s_d) + l2 * info_nce(s_l) + l3 * info_nce(s_m) + info_nce(s_i)) / 4
    if not distill:
        return loss
    return (loss + (l1 * distilled(s_d) + l2 * distilled(s_l) + l3 * distilled(s_m)) / 3) / 2


QUERY_LENGTHS, PASSAGE_LENGTHS = [3, 0, 5], [4, 9, 1, 2, 0, 9]


def gradients(total: Tensor, parts: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, parts))


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_loss_and_gradients_equal_the_formulas_of_the_paper(
    distill: bool, official: bool, dtype: torch.dtype, tolerance: float
) -> None:
    # float32: scores of up to 2 / temperature carry 2^-24 relative error into the logarithms: 20 * 6e-8, gradients
    # another 1 / temperature of it.
    q, p = leaves(1, QUERY_LENGTHS, torch.float64), leaves(2, PASSAGE_LENGTHS, torch.float64)
    wanted = paper_loss(plain_scores(q, p, QUERY_LENGTHS, PASSAGE_LENGTHS, official), 2, distill, 0.1)
    sources = [q[0], q[2], q[3], p[0], p[2], p[3]]
    wanted_gradients = gradients(wanted, sources)
    copies = [[part.detach().to(dtype) if part.is_floating_point() else part for part in side] for side in (q, p)]
    leaves_of = [part.requires_grad_() for side in copies for part in side if part.is_floating_point()]
    loss = m3_loss(
        embeddings(tuple(copies[0]), QUERY_LENGTHS),
        embeddings(tuple(copies[1]), PASSAGE_LENGTHS),
        temperature=0.1,
        self_distill=distill,
        official=official,
    )
    torch.testing.assert_close(loss.total.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
    for given, expected in zip(gradients(loss.total, leaves_of), wanted_gradients):
        torch.testing.assert_close(given.double(), expected, rtol=tolerance, atol=tolerance)


def test_weights_of_heads_and_of_their_losses() -> None:
    q, p = leaves(1, QUERY_LENGTHS, torch.float64), leaves(2, PASSAGE_LENGTHS, torch.float64)
    chosen = {"weights": (0.7, 0.2, 1.6), "loss_weights": (0.9, 0.4, 1.3)}
    wanted = paper_loss(plain_scores(q, p, QUERY_LENGTHS, PASSAGE_LENGTHS, False), 2, True, 0.1, **chosen)
    sides = embeddings(q, QUERY_LENGTHS), embeddings(p, PASSAGE_LENGTHS)
    torch.testing.assert_close(m3_loss(*sides, temperature=0.1, **chosen).total, wanted)


@pytest.mark.parametrize("left_out", range(3))
def test_two_heads_have_the_divisors_three_and_two(left_out: int) -> None:
    heads = tuple(head for head in HEADS if head != HEADS[left_out])
    q, p = leaves(1, QUERY_LENGTHS, torch.float64), leaves(2, PASSAGE_LENGTHS, torch.float64)
    scores = plain_scores(q, p, QUERY_LENGTHS, PASSAGE_LENGTHS, False)
    loss = m3_loss(embeddings(q, QUERY_LENGTHS, heads), embeddings(p, PASSAGE_LENGTHS, heads), temperature=0.1)
    absent = {"weights": [1.0, 0.3, 1.0], "loss_weights": [1.0, 0.1, 1.0]}
    for numbers in absent.values():
        numbers[left_out] = 0.0
    kept = {name: tuple(numbers) for name, numbers in absent.items()}
    without = 4 * paper_loss(scores, 2, False, 0.1, **kept)
    distilled = 3 * (2 * paper_loss(scores, 2, True, 0.1, **kept) - without / 4)
    torch.testing.assert_close(loss.total, (without / 3 + distilled / 2) / 2)
    assert getattr(loss, HEADS[left_out]) is None and loss.ensemble is not None and loss.distill is not None


def test_official_counts_padding_as_zero_vectors() -> None:
    q, p = leaves(1, QUERY_LENGTHS, torch.float64), leaves(2, PASSAGE_LENGTHS, torch.float64)
    sides = embeddings(q, QUERY_LENGTHS), embeddings(p, PASSAGE_LENGTHS)
    plain, official = m3_loss(*sides, temperature=0.1), m3_loss(*sides, temperature=0.1, official=True)
    assert abs(float((plain.total - official.total).detach())) > 1e-3
    again = m3_loss(*sides, temperature=0.1, zero_floor=True)
    assert torch.equal(again.total, official.total)


@pytest.mark.parametrize("head", HEADS)
def test_a_single_head_is_its_plain_contrastive_loss(head: str) -> None:
    q, p = leaves(3, [2, 4], torch.float64), leaves(4, [5, 3, 2, 6], torch.float64)
    loss = m3_loss(embeddings(q, [2, 4], (head,)), embeddings(p, [5, 3, 2, 6], (head,)), temperature=0.5)
    scores = plain_scores(q, p, [2, 4], [5, 3, 2, 6], False)[head] / 0.5
    wanted = -(scores.log_softmax(1)[0, 0] + scores.log_softmax(1)[1, 2]) / 2
    torch.testing.assert_close(loss.total, wanted)
    assert loss.ensemble is None and loss.distill is None
    assert sum(part is not None for part in loss[1:4]) == 1


@pytest.mark.parametrize("teacher_loss", ["kl_div", "m3_kd_loss"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_teacher_scores_replace_the_positive_as_target(teacher_loss: Any, in_batch: bool) -> None:
    q, p = leaves(5, [2, 4], torch.float64), leaves(6, [5, 3, 2, 6, 1, 4], torch.float64)
    teacher = torch.tensor([[2.0, 0.5, -1.0], [0.3, 0.9, 0.1]], dtype=torch.float64)
    loss = m3_loss(
        embeddings(q, [2, 4], ("dense",)),
        embeddings(p, [5, 3, 2, 6, 1, 4], ("dense",)),
        temperature=0.5,
        teacher_scores=teacher,
        teacher_loss=teacher_loss,
        in_batch_negatives=in_batch,
    )
    scores = (q[0] @ p[0].T / 0.5).tolist()
    wanted = 0.0
    for b in range(2):
        own = list(range(3 * b, 3 * b + 3))
        pool = list(range(6)) if in_batch else own
        target = [math.exp(value) / sum(math.exp(other) for other in teacher[b].tolist()) for value in teacher[b]]

        def cross_entropy(column: int, columns: list[int], b: int = b) -> float:
            return math.log(sum(math.exp(scores[b][other]) for other in columns)) - scores[b][column]

        if teacher_loss == "kl_div":
            wanted += sum(t * cross_entropy(column, own) for t, column in zip(target, own))
            wanted += cross_entropy(own[0], pool)
        else:
            for i, t in enumerate(target):
                wanted += t * cross_entropy(own[i], [column for column in pool if column not in own[:i]])
    assert loss.total.item() == pytest.approx(wanted / 2, abs=1e-10)


def test_without_in_batch_negatives_only_the_own_group_matters() -> None:
    lengths = [5, 3, 2, 6]
    q, p = leaves(3, [2, 4], torch.float64), leaves(4, lengths, torch.float64)
    sides = embeddings(q, [2, 4]), embeddings(p, lengths)
    together = m3_loss(*sides, temperature=0.3, in_batch_negatives=False).total
    alone = [
        m3_loss(sides[0].select([b]), sides[1].select([2 * b, 2 * b + 1]), temperature=0.3).total for b in range(2)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_queries_of_one_rank_among_the_passages_of_all_ranks() -> None:
    lengths = [5, 3, 2, 6, 4, 1, 7, 2]
    q, p = leaves(3, [2, 4, 3, 1], torch.float64), leaves(4, lengths, torch.float64)
    sides = embeddings(q, [2, 4, 3, 1]), embeddings(p, lengths)
    whole = m3_loss(*sides).total
    ranks = [
        m3_loss(sides[0].select(slice(2 * r, 2 * r + 2)), sides[1], group_size=2, first_passage=4 * r).total
        for r in range(2)
    ]
    torch.testing.assert_close(torch.stack(ranks).mean(), whole)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"weights": (1.0, -1.0, 1.0)}, "weights"),
        ({"loss_weights": (1.0, 1.0)}, "loss_weights"),
        ({"teacher_scores": torch.zeros(2, 3)}, "teacher_scores"),
        ({"teacher_loss": "mse"}, "teacher_loss"),
        ({"group_size": 3}, "group_size"),
        ({"first_passage": 1}, "passage"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], name: str) -> None:
    sides = embeddings(leaves(1, [2, 2], torch.float32), [2, 2]), embeddings(leaves(2, [1] * 4, torch.float32), [1] * 4)
    with pytest.raises(ValueError, match=name):
        m3_loss(*sides, **change)


def test_heads_must_be_the_same_on_both_sides() -> None:
    q, p = leaves(1, [2], torch.float32), leaves(2, [1, 3], torch.float32)
    with pytest.raises(ValueError, match="heads"):
        m3_loss(embeddings(q, [2], ("dense",)), embeddings(p, [1, 3]))
    with pytest.raises(TypeError, match="tensor"):
        m3_loss(M3Embeddings(q[0].detach().numpy()), embeddings(p, [1, 3], ("dense",)))
