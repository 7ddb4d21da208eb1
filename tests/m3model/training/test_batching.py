"""Batches: which rows share one, on every rank, and what is drawn for a row."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from m3model import M3Model
from m3model.training import (
    DataSource,
    LengthGroupedBatchSampler,
    TrainingCollator,
    TrainingDataError,
    TrainingDataset,
    TrainingRow,
)
from m3model.training.batching import _separate, token_lengths


def dataset_of(folder: Path, *lengths: list[int], types: list[str] | None = None, **source: Any) -> TrainingDataset:
    """A source for each list, with a row of each length."""
    sources = []
    for number, column in enumerate(lengths):
        path = folder / f"{number}.jsonl"
        kinds = [types[place % len(types)] if types else None for place in range(len(column))]
        rows = [{"query": "q", "pos": ["p" * length], "type": kind} for length, kind in zip(column, kinds)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {name: value[number] if isinstance(value, list) else value for name, value in source.items()}
        sources.append(DataSource(path, **values))
    return TrainingDataset(sources)


def ranks(dataset: TrainingDataset, batch_size: int, world_size: int, **options: Any) -> list[list[list[int]]]:
    samplers = [
        LengthGroupedBatchSampler(dataset, batch_size, world_size=world_size, rank=rank, **options)
        for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert all(len(sampler) == len(own) for sampler, own in zip(samplers, batches))
    return batches


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_row_comes_as_often_as_its_weight_says_and_ranks_agree(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=40), min_size=1, max_size=3))
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.5, 2.0, 2.3]), min_size=len(lengths), max_size=len(lengths)))
    sizes = data.draw(st.lists(st.sampled_from([None, 1, 3]), min_size=len(lengths), max_size=len(lengths)))
    types = data.draw(st.sampled_from([None, ["a", "b"]]))
    buckets = data.draw(st.sampled_from([None, {20: 5, 40: 3}, {10: 2, 30: 4, 100: 1}]))
    world_size, drop_last = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    options = {"length_buckets": buckets, "seed": data.draw(st.integers(0, 5)), "epoch": data.draw(st.integers(0, 2))}
    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(Path(folder), *lengths, types=types, weight=weights, batch_size=sizes)
    try:
        batches = ranks(dataset, 4, world_size, drop_last=drop_last, **options)
    except ValueError as error:
        assert "no batch is left" in str(error)
        assert drop_last or all(weight * len(column) < 1 for weight, column in zip(weights, lengths))
        return
    assert len({len(own) for own in batches}) == 1
    seen: Counter[int] = Counter()
    for together in zip(*batches):
        rows = [row for own in together for row in own]
        assert len({len(own) for own in together}) == 1
        (task,) = {int(dataset.tasks[row]) for row in rows}
        source = dataset.task_sources[task]
        in_task = int((dataset.tasks == task).sum())
        assert len(set(rows)) == len(rows) or in_task < world_size
        limit = sizes[source] or 4
        if buckets:
            longest = max(int(dataset.character_lengths[row]) for row in rows)
            limit = min([limit, *(size for upper, size in buckets.items() if upper >= longest)][:2])
        assert len(together[0]) <= limit
        seen.update(rows)
    for number, column in enumerate(lengths):
        rows = [row for row in range(len(dataset)) if dataset.source_of(row) == number]
        wanted = weights[number] * len(column)
        passes = math.ceil(weights[number]) + 1
        tasks = len({int(dataset.tasks[row]) for row in rows})
        total = sum(seen[row] for row in rows)
        if drop_last:
            assert total <= round(wanted) + 1
            assert all(seen[row] <= passes for row in rows)
        else:
            assert round(wanted) - 1 <= total <= round(wanted) + 1 + tasks * passes * (world_size - 1)
            assert all(seen[row] >= math.floor(weights[number]) for row in rows)


def test_rows_of_a_batch_are_of_similar_length(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 3000)
    dataset = dataset_of(tmp_path, lengths.tolist())
    spreads = [np.ptp(lengths[batch]) for batch in LengthGroupedBatchSampler(dataset, 8)]
    # A pool of 32 batches holds 256 of lengths spread evenly over 2000: 8 neighbours span about 8/256 of that.
    assert np.mean(spreads) < 2.5 * 2000 * 8 / 256
    assert len(spreads) == 375


def test_rows_of_two_languages_are_batched_by_tokens(tmp_path: Path) -> None:
    """Chinese of a character a token beside English of four: characters would put them together."""

    def tokenize(texts: list[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts = [min(2 + sum(4 if char >= "\u4e00" else 1 for char in text) // 4, max_length) for text in texts]
        offsets = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
        return torch.zeros(int(offsets[-1]), dtype=torch.int32), offsets

    random = np.random.default_rng(1)
    characters = random.integers(1, 3000, 2000).tolist()
    texts = ["水" * count if count % 2 else "w" * count for count in characters]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": "q", "pos": [text], "neg": [text[:9]]}) + "\n" for text in texts))
    dataset = TrainingDataset([DataSource(path)])
    exact = tokenize(texts, 2000)[1].diff().numpy()
    found = token_lengths(dataset, tokenize, 2000)
    short = np.array(characters) <= 256
    assert (found[short] == exact[short]).all() and found.max() == exact.max() == 2000
    # The two special tokens of the 256 characters are counted again for each further 256.
    assert (found >= exact).all() and (found - exact <= 2 * 3000 / 256).all()

    def filled(lengths: Any) -> float:
        batches = list(LengthGroupedBatchSampler(dataset, 8, lengths=lengths))
        return sum(exact[batch].sum() for batch in batches) / sum(8 * exact[batch].max() for batch in batches)

    assert filled(found) > 0.9 > 0.7 > filled(None), f"{filled(found)} by tokens, {filled(None)} by characters"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_that_share_an_answer_are_kept_apart_where_that_is_possible(data: st.DataObject) -> None:
    size, batches = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 8))
    # Groups of at most half as many rows as there are batches, and at most half of the rows in groups of several.
    groups = data.draw(st.lists(st.integers(0, 9), min_size=size * batches, max_size=size * batches))
    seen: Counter[int] = Counter()
    for place, group in enumerate(groups):
        seen[group] += 1
        groups[place] = group if place % 2 and seen[group] <= batches // 2 else 100 + place
    rows = np.arange(size * batches)
    _separate(rows, np.array(groups, dtype=np.int32), size)
    assert sorted(rows.tolist()) == list(range(size * batches))
    for begin in range(0, len(rows), size):
        inside = [groups[row] for row in rows[begin : begin + size]]
        assert len(set(inside)) == len(inside)


def test_questions_about_one_paragraph_come_in_different_batches(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "rows.jsonl"
    paragraphs = ["p" * int(random.integers(100, 400)) + str(number) for number in range(300)]
    lines = [{"query": f"q{number}", "pos": [paragraphs[number % 300]]} for number in range(1200)]
    lines += [{"query": "q5", "pos": [f"other {number}"]} for number in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = TrainingDataset([DataSource(path)])
    assert len(set(dataset.answer_groups.tolist())) == 300
    assert len(set(dataset.answer_groups[[5, 305, 1200, 1203]].tolist())) == 1
    for world_size in (1, 2):
        for together in zip(*ranks(dataset, 16, world_size)):
            groups = [int(dataset.answer_groups[row]) for own in together for row in own]
            assert len(set(groups)) == len(groups)


def test_rows_that_cannot_be_kept_apart_stay_in_batches_of_their_length(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [{"query": "q" * number, "pos": [f"class {number % 2}"]} for number in range(20, 60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = TrainingDataset([DataSource(path)])
    batches = list(LengthGroupedBatchSampler(dataset, 4))
    assert all(np.ptp(dataset.character_lengths[batch]) == 3 for batch in batches)


def test_length_buckets_give_the_batch_sizes_of_the_paper(tmp_path: Path) -> None:
    lengths = [*[100] * 480, *[700] * 320, *[1500] * 200, *[9000] * 40]
    dataset = dataset_of(tmp_path, lengths)
    table = {500: 48, 1000: 32, 2000: 20, 8192: 8}
    batches = list(LengthGroupedBatchSampler(dataset, 48, length_buckets=table))
    found = Counter((max(lengths[row] for row in batch), len(batch)) for batch in batches)
    assert found == {(100, 48): 10, (700, 32): 10, (1500, 20): 10, (9000, 8): 5}
    half = [length // 2 for length in lengths]
    halved = LengthGroupedBatchSampler(dataset, 48, length_buckets=table, lengths=np.array(half, dtype=np.int32))
    assert Counter(len(batch) for batch in halved) == {48: 16, 32: 7, 8: 6}


def test_what_is_left_of_a_range_goes_to_the_next_longer(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [1] * 5 + [10] * 5)
    batches = list(LengthGroupedBatchSampler(dataset, 4, length_buckets={5: 4, 20: 3}))
    assert sorted(len(batch) for batch in batches) == [3, 3, 4]
    assert sorted(row for batch in batches for row in batch) == list(range(10))


def test_epochs_differ_repeat_and_have_one_length(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, list(range(1, 41)), list(range(1, 31)), weight=[1.0, 0.37])
    sampler = LengthGroupedBatchSampler(dataset, 4, length_buckets={10: 4, 40: 2}, seed=3)
    epochs = []
    for epoch in (0, 1, 2, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[1] == epochs[3] and epochs[0] != epochs[1]
    assert {len(batches) for batches in epochs} == {len(sampler)}
    other = LengthGroupedBatchSampler(dataset, 4, length_buckets={10: 4, 40: 2}, seed=4, epoch=1)
    assert list(other) != epochs[1]


def test_wrong_arguments_of_the_sampler_name_themselves(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [1, 2, 3])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"world_size": 2, "rank": 2}, "rank is 2; accepted: 0 to world_size - 1 = 1"),
        ({"seed": -1}, "seed is -1"),
        ({"epoch": -1}, "epoch is -1"),
        ({"length_buckets": {}}, "length_buckets is empty"),
        ({"length_buckets": {10: 0}}, r"the batch size of length_buckets\[10\] is 0"),
        ({"lengths": np.zeros(2, dtype=np.int32)}, r"lengths has shape \(2,\); accepted: \(3,\)"),
        ({"drop_last": True}, "no batch is left of 3 rows"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            LengthGroupedBatchSampler(dataset, **{"batch_size": 4, **options})


class Words:
    """A tokenizer that remembers texts: one id a word, special ids around them."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, texts: list[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append((texts, max_length))
        lengths = [min(len(text.split()) + 2, max_length) for text in texts]
        offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        return torch.zeros(int(offsets[-1]), dtype=torch.int32), offsets


def row(index: int = 0, *, positives: int = 1, negatives: int = 3, scores: bool = False, **more: Any) -> TrainingRow:
    return TrainingRow(
        query=f"query {index}",
        positives=tuple(f"p{number}" for number in range(positives)),
        negatives=tuple(f"n{number}" for number in range(negatives)),
        positive_scores=tuple(float(number) for number in range(positives)) if scores else None,
        negative_scores=tuple(-float(number) for number in range(negatives)) if scores else None,
        **{"prompt": None, "type": None, "index": index, **more},
    )


def groups(words: Words, group_size: int) -> list[list[str]]:
    passages = words.calls[-1][0]
    return [passages[begin : begin + group_size] for begin in range(0, len(passages), group_size)]


@pytest.mark.parametrize(("negatives", "group_size"), [(3, 4), (9, 4), (2, 8), (1, 6), (0, 1), (5, 1)])
def test_a_group_is_one_positive_and_negatives_repeated_only_where_too_few(negatives: int, group_size: int) -> None:
    words = Words()
    rows = [row(index, positives=2, negatives=negatives) for index in range(40)]
    batch = TrainingCollator(words, group_size=group_size, query_max_length=32, passage_max_length=64)(rows)
    assert words.calls[0] == ([each.query for each in rows], 32) and words.calls[1][1] == 64
    assert batch["group_size"] == group_size and "teacher_scores" not in batch
    assert len(batch["query_offsets"]) == 41 and len(batch["passage_offsets"]) == 40 * group_size + 1
    drawn: Counter[str] = Counter()
    for first, *others in groups(words, group_size):
        drawn.update([first, *others])
        counts = Counter(others)
        assert first in ("p0", "p1") and set(counts) <= {f"n{number}" for number in range(negatives)}
        if others:
            assert max(counts.values()) - min([*counts.values()] if len(counts) == negatives else [0]) <= 1
    assert drawn["p0"] > 5 and drawn["p1"] > 5
    assert len(drawn) == 2 + (negatives if group_size > 1 else 0)


def test_draws_depend_on_seed_epoch_and_row_alone() -> None:
    words = Words()
    rows = [row(index, positives=5, negatives=40) for index in range(20)]

    def draw(chosen: list[Any], **options: Any) -> list[list[str]]:
        collator = TrainingCollator(words, group_size=4, seed=options.get("seed", 0))
        collator.set_epoch(options.get("epoch", 0))
        collator(chosen)
        return groups(words, 4)

    whole = draw(rows)
    assert draw(rows[::-1]) == whole[::-1] and draw(rows[7:9]) == whole[7:9]
    assert draw([(3, rows[5])]) == draw([row(3, positives=5, negatives=40)])
    assert draw(rows, epoch=1) != whole and draw(rows, seed=1) != whole and draw(rows, epoch=0) == whole


def test_persistent_workers_draw_anew_in_the_next_epoch(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [{"query": f"q{n}", "pos": ["p"], "neg": ["n " * k for k in range(1, 30)]} for n in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = TrainingDataset([DataSource(path)])
    sampler = LengthGroupedBatchSampler(dataset, 4)
    collator = TrainingCollator(Words(), group_size=3)
    loader: Any = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collator, num_workers=1, persistent_workers=True
    )  # fmt: skip

    def epoch(number: int) -> list[list[int]]:
        sampler.set_epoch(number)
        collator.set_epoch(number)
        return [batch["passage_offsets"].tolist() for batch in loader]

    first, second = epoch(0), epoch(1)
    assert first != second and epoch(0) == first
    collator.set_epoch(1)
    sampler.set_epoch(1)
    here = [collator([dataset[number] for number in batch])["passage_offsets"].tolist() for batch in sampler]
    assert here == second


def test_teacher_scores_follow_the_passages() -> None:
    words = Words()
    batch = TrainingCollator(words, group_size=4)(
        [row(index, positives=3, negatives=6, scores=True) for index in (4, 5)]
    )
    expected = [[float(text[1:]) * (1 if text[0] == "p" else -1) for text in group] for group in groups(words, 4)]
    assert batch["teacher_scores"].dtype == torch.float32 and batch["teacher_scores"].tolist() == expected


def test_instructions_prompts_and_types_follow_flagembedding() -> None:
    words = Words()
    queries = Words()
    collator = TrainingCollator(
        words, group_size=4, query_instruction="Q: ", passage_instruction="P: ", query_tokenizer_function=queries
    )  # fmt: skip
    assert collator([row(1), row(2, prompt="mine: ")])["group_size"] == 4
    assert queries.calls[-1][0] == ["Q: query 1", "mine: query 2"]
    assert all(text.startswith("P: ") for text in words.calls[-1][0])
    collator([row(1, prompt="same: ", type="symmetric_sts")])
    assert all(text.startswith("same: ") for text in words.calls[-1][0])
    assert collator([row(1, type="only_1neg")])["group_size"] == 2
    assert collator([row(1, type="symmetric_class", negatives=1)])["group_size"] == 2
    assert collator([row(1, type="symmetric_class", negatives=9)])["group_size"] == 4
    assert collator([row(1, type="anything")])["group_size"] == 4


def test_rows_that_cannot_share_a_batch_are_errors() -> None:
    collator = TrainingCollator(Words(), group_size=4)
    with pytest.raises(TrainingDataError, match=r"a.jsonl:7: the row has no negatives, but group_size is 4"):
        collator([row(1), row(2, negatives=0, location="a.jsonl:7")])
    with pytest.raises(ValueError, match="teacher scores all or none"):
        collator([row(1), row(2, scores=True)])
    with pytest.raises(ValueError, match="groups of one size"):
        collator([row(1), row(2, type="only_1neg")])
    with pytest.raises(ValueError, match="has no index"):
        collator([row(-1)])
    with pytest.raises(ValueError, match="rows is empty"):
        collator([])
    for options in ({"group_size": 0}, {"query_max_length": 0}, {"seed": -1}, {"shuffle_ratio": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}.* is "):
            TrainingCollator(Words(), **options)  # type: ignore[arg-type]


def test_shuffle_ratio_orders_the_thirds_of_long_positives_anew() -> None:
    words = Words()
    text = "".join(chr(97 + number // 60) for number in range(180))
    rows = [row(index, negatives=0) for index in range(200)]
    rows = [TrainingRow(**{**vars(each), "positives": (text,)}) for each in rows]
    TrainingCollator(words, group_size=1, shuffle_ratio=0.3)(rows)
    changed = [passage for passage in words.calls[-1][0] if passage != text]
    # 200 · 0.3 ± 4 standard deviations; each is another order of three parts, or the same order with spaces.
    assert 34 <= len(changed) <= 86
    assert all(sorted(passage.replace(" ", "")) == sorted(text) for passage in changed)
    assert len(set(changed)) == 6
    TrainingCollator(words, group_size=1, shuffle_ratio=1.0)([row(0, negatives=0)])
    assert words.calls[-1][0] == ["p0"]


def test_a_model_tokenizes_the_batch(model: M3Model) -> None:
    batch = TrainingCollator(model.tokenize, group_size=3)([row(1), row(2)])
    ids, offsets = model.tokenize(["query 1", "query 2"])
    assert torch.equal(batch["query_ids"], ids) and torch.equal(batch["query_offsets"], offsets)
    assert batch["passage_offsets"].dtype == torch.int32 and len(batch["passage_offsets"]) == 7
