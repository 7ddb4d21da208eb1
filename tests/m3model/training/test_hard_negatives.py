"""Mining: what may become a negative, against scores of all passages; and runs that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from m3model import M3Model
from m3model.cli.app import app
from m3model.retrieval.fingerprint import fingerprint
from m3model.retrieval.milvus import MilvusIndex
from m3model.training import TrainingDataError
from m3model.training.hard_negatives import MiningOptions, choose_negatives, mine_hard_negatives
from m3model.training.inspection import text_digest

WORDS = ["river", "mountain", "city", "bridge", "matrix", "vector", "query", "north", "south", "list", "open", "file"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of a tiny model are too small to be shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def text(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows with 1 or 2 positives and up to 3 negatives; 20 of the queries come twice, with other positives."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("mine") / "rows.jsonl"
    queries = [f"{text(random, 3)} {number}" for number in range(40)]
    lines = []
    for number in range(60):
        positives = [f"{text(random, 6)} {number} {k}" for k in range(random.integers(1, 3))]
        negatives = [text(random, 5) for _ in range(random.integers(0, 4))]
        lines.append({"id": number, "query": queries[number % 40], "pos": positives, "neg": negatives})
    lines[3]["pos"].append(" " + queries[3])
    lines[5] |= {"pos_scores": [1.0] * len(lines[5]["pos"]), "neg_scores": [0.0] * len(lines[5]["neg"])}
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(text: str) -> int:
    return text_digest(text)


class Oracle:
    """Rankings of the whole corpus by M3Model.score."""

    def __init__(self, model: M3Model, rows: list[dict[str, Any]], corpus: list[str], head: str = "dense") -> None:
        unique = {same(passage): passage for passage in reversed(corpus)}
        self.passages = [passage for digest, passage in reversed(unique.items())]
        self.scores = model.score([row["query"] for row in rows], self.passages)[head].numpy()
        self.positives = [
            {same(passage) for other in rows if same(other["query"]) == same(row["query"]) for passage in other["pos"]}
            for row in rows
        ]

    def candidates(self, number: int, row: dict[str, Any], options: MiningOptions) -> set[str]:
        """What may be sampled for a row: one score at a time."""
        scores = self.scores[number]
        order = np.argsort(-scores, kind="stable")
        positives = [scores[place] for place in order if same(self.passages[place]) in self.positives[number]]
        limit = np.inf
        if options.absolute_margin is not None:
            limit = min(limit, min(positives) - options.absolute_margin)
        if options.relative_margin is not None:
            limit = min(limit, min(positives) - options.relative_margin * abs(min(positives)))
        return {
            self.passages[place]
            for rank, place in enumerate(order)
            if options.rank_range[0] <= rank < options.rank_range[1]
            and same(self.passages[place]) not in self.positives[number] | {same(row["query"])}
            and scores[place] <= limit
        }


def corpus_of(rows: list[dict[str, Any]]) -> list[str]:
    return [passage for row in rows for passage in (*row["pos"], *row["neg"])]


@pytest.mark.parametrize(
    "options",
    [
        MiningOptions(negatives=5, rank_range=(2, 30), fill=False),
        MiningOptions(negatives=4, rank_range=(0, 40), relative_margin=0.05, fill=False, seed=3),
        MiningOptions(negatives=100, rank_range=(0, 1000), absolute_margin=0.1, fill=False, block=20),
        MiningOptions(negatives=3, rank_range=(0, 20), head="sparse", fill=False),
        MiningOptions(negatives=3, rank_range=(1, 20), head="all", fill=False),
    ],
    ids=["ranks", "relative margin", "absolute margin", "sparse", "all"],
)
def test_negatives_are_those_of_a_full_ranking(
    model: M3Model, rows: Path, tmp_path: Path, options: MiningOptions
) -> None:
    summary = mine_hard_negatives(model, rows, tmp_path / "out.jsonl", options=options)
    before, after = read(rows), read(tmp_path / "out.jsonl")
    oracle = Oracle(model, before, corpus_of(before), options.head)
    assert summary.corpus == len(oracle.passages) and summary.rows == len(after) == 60
    short = 0
    for number, (old, new) in enumerate(zip(before, after)):
        kept = {key: value for key, value in old.items() if key not in ("neg", "pos_scores", "neg_scores")}
        assert {key: value for key, value in new.items() if key != "neg"} == kept
        allowed = oracle.candidates(number, old, options)
        assert set(new["neg"]) <= allowed and len(new["neg"]) == min(options.negatives, len(allowed)), number
        assert len(set(new["neg"])) == len(new["neg"])
        short += len(new["neg"]) < options.negatives
    assert summary.short_rows == short and summary.negatives == sum(len(row["neg"]) for row in after)
    assert summary.random == 0 and not (tmp_path / "out.jsonl.mining").exists()
    if options.negatives == 100:
        assert summary.short_rows > 0 and summary.near_positives > 0


def test_random_passages_top_up_and_are_never_among_those_found(model: M3Model, rows: Path, tmp_path: Path) -> None:
    options = MiningOptions(negatives=12, rank_range=(4, 10))
    summary = mine_hard_negatives(model, rows, tmp_path / "out.jsonl", options=options)
    before, after = read(rows), read(tmp_path / "out.jsonl")
    oracle = Oracle(model, before, corpus_of(before))
    assert summary.short_rows == 0 and summary.random > 6 * 60
    for number, (old, new) in enumerate(zip(before, after)):
        hard = oracle.candidates(number, old, MiningOptions(rank_range=(4, 10)))
        top = oracle.candidates(number, old, MiningOptions(rank_range=(0, 10)))
        assert set(new["neg"]) & top == hard and len(set(new["neg"])) == 12
        assert not {same(passage) for passage in new["neg"]} & oracle.positives[number]


def test_a_corpus_of_its_own_holds_the_positives_too(model: M3Model, rows: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    pool = [*(text(random, 4) for _ in range(50)), "  ", read(rows)[0]["pos"][0]]
    options = MiningOptions(negatives=500, rank_range=(0, 500), fill=False)
    mine_hard_negatives(model, rows, tmp_path / "out.jsonl", corpus=lambda: pool, options=options)
    before = read(rows)
    oracle = Oracle(model, before, [text for text in pool if text.strip()] + [p for row in before for p in row["pos"]])
    for number, (old, new) in enumerate(zip(before, read(tmp_path / "out.jsonl"))):
        assert set(new["neg"]) == oracle.candidates(number, old, options)


def test_instructions_go_before_queries_and_passages(model: M3Model, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [{"query": word, "pos": [f"{word} {other}"]} for word in WORDS for other in ("a", "b")]
    prefixed = [{"query": f"open {line['query']}", "pos": [f"close {line['pos'][0]}"]} for line in lines]
    out, expected = [], []
    for case, content in (("plain", lines), ("prefixed", prefixed)):
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
        options = MiningOptions(negatives=4, rank_range=(0, 4))
        if case == "plain":
            options = MiningOptions(
                negatives=4, rank_range=(0, 4), query_instruction="open ", passage_instruction="close "
            )  # fmt: skip
        mine_hard_negatives(model, path, tmp_path / f"{case}.jsonl", options=options)
    out = [row["neg"] for row in read(tmp_path / "plain.jsonl")]
    expected = [[passage.removeprefix("close ") for passage in row["neg"]] for row in read(tmp_path / "prefixed.jsonl")]
    assert out == expected


def test_choose_negatives_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], dtype=np.float32)
    positive = np.array([False, True, False, False, True, False])
    nothing = np.zeros(6, dtype=bool)
    random = np.random.default_rng(0)

    def choose(all_found: bool = True, barred: Any = nothing, **options: Any) -> tuple[list[int], int]:
        chosen = MiningOptions(**{"negatives": 9, "rank_range": (0, 6), **options})
        return choose_negatives(scores, positive, barred, all_found, chosen, random)

    assert choose() == ([0, 2, 3, 5], 0) and choose(all_found=False) == ([0, 2, 3, 5], 0)
    assert choose(rank_range=(2, 5)) == ([2, 3], 0)
    assert choose(barred=np.arange(6) == 3) == ([0, 2, 5], 0)
    assert choose(absolute_margin=0.05) == ([5], 3) and choose(absolute_margin=0.2) == ([], 4)
    assert choose(relative_margin=0.1) == ([5], 3) and choose(relative_margin=0.5) == ([], 4)
    assert choose(absolute_margin=0.0, rank_range=(2, 6)) == ([5], 2)
    assert choose(relative_margin=0.0, all_found=False) == ([], 4)
    below = MiningOptions(negatives=9, rank_range=(0, 6), relative_margin=0.5)
    assert choose_negatives(scores - 1, positive, nothing, True, below, random) == ([], 4)
    drawn = {tuple(choose(negatives=2)[0]) for _ in range(200)}
    assert drawn == {(0, 2), (0, 3), (0, 5), (2, 3), (2, 5), (3, 5)}


def mine_and_die(folder: Path, rows: Path, out: Path, last: tuple[str, int]) -> None:
    """Mine in this process and kill it once `last` = (stage, count) is done."""

    def progress(stage: str, done: int, _total: int) -> None:
        if (stage, done) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    mine_hard_negatives(M3Model.from_pretrained(folder), rows, out, options=MiningOptions(**KILLED), progress=progress)


KILLED: dict[str, Any] = {"negatives": 4, "rank_range": (1, 25), "block": 16}


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    model: M3Model, folder: Path, rows: Path, tmp_path: Path
) -> None:
    options = MiningOptions(**KILLED)
    mine_hard_negatives(model, rows, tmp_path / "whole.jsonl", options=options)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    out = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.mining" / "rows.part"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["m3model.training.hard_negatives", "m3model.model"])
    for stage, done, whole_rows in (("corpus", 48, 0), ("rows", 32, 32)):
        process = processes.Process(target=mine_and_die, args=(folder, rows, out, (stage, done)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not out.exists()
        assert (len(part.read_bytes().splitlines()) if part.exists() else 0) == whole_rows
    with part.open("ab") as file:
        file.write(part.read_bytes().splitlines(keepends=True)[0] + b'{"query": "torn')
    summary = mine_hard_negatives(model, rows, out, options=options)
    assert (summary.resumed_rows, summary.rows) == (32, 28)
    assert out.read_bytes() == whole and not part.parent.exists()


def test_a_full_disk_stops_the_run_and_what_was_done_serves_the_next(
    model: M3Model, rows: Path, tmp_path: Path
) -> None:
    options = MiningOptions(**KILLED)
    out = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("rows", 16):
            resource.setrlimit(resource.RLIMIT_FSIZE, (part.stat().st_size + 100, before[1]))

    part = tmp_path / "out.jsonl.mining" / "rows.part"
    try:
        with pytest.raises(OSError, match="File too large"):
            mine_hard_negatives(model, rows, out, options=options, progress=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists() and len(part.read_bytes().splitlines()) >= 16
    assert mine_hard_negatives(model, rows, out, options=options).resumed_rows == 16
    assert len(read(out)) == 60


def test_two_processes_do_not_mine_into_one_file(model: M3Model, rows: Path, tmp_path: Path) -> None:
    def second(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("rows", 32):
            with pytest.raises(RuntimeError, match="another process mines into"):
                mine_hard_negatives(model, rows, tmp_path / "out.jsonl", options=MiningOptions(**KILLED))

    mine_hard_negatives(model, rows, tmp_path / "out.jsonl", options=MiningOptions(**KILLED), progress=second)
    assert len(read(tmp_path / "out.jsonl")) == 60


def test_an_unfinished_run_of_other_rows_options_or_model_is_an_error(
    model: M3Model, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"

    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "rows" and done:
            raise KeyboardInterrupt

    options = MiningOptions(**KILLED)
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives(model, rows, out, options=options, progress=stop)
    with pytest.raises(ValueError, match="an unfinished run with other negatives, seed; restart forgets it"):
        mine_hard_negatives(model, rows, out, options=MiningOptions(**{**KILLED, "negatives": 3, "seed": 1}))
    changed = tmp_path / "changed.jsonl"
    changed.write_text(rows.read_text().replace("river", "list", 1))
    with pytest.raises(ValueError, match="an unfinished run with other rows or corpus"):
        mine_hard_negatives(model, changed, out, options=options)
    other = M3Model(model.config, model.tokenizer).eval()
    with pytest.raises(ValueError, match="an unfinished run of another model"):
        mine_hard_negatives(other, rows, out, options=options)
    summary = mine_hard_negatives(model, changed, out, options=MiningOptions(negatives=3), restart=True)
    assert summary.resumed_rows == 0 and len(read(out)) == 60


def test_bad_arguments_and_rows_are_errors_that_leave_nothing(model: M3Model, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + '{"query": "q"}\n')
    with pytest.raises(TrainingDataError, match=r"bad.jsonl:61: no 'pos'"):
        mine_hard_negatives(model, bad, out)
    bad.write_text("\n")
    with pytest.raises(TrainingDataError, match="no rows"):
        mine_hard_negatives(model, bad, out)
    with pytest.raises(ValueError, match="not packed"):
        mine_hard_negatives(model, rows, tmp_path / "out.jsonl.gz")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["bad.jsonl"]
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        mine_hard_negatives(model, rows, out)
    for options in (
        {"negatives": 0},
        {"seed": -1},
        {"block": 0},
        {"rank_range": (5, 5)},
        {"rank_range": (-1, 5)},
        {"absolute_margin": -0.1},
        {"relative_margin": float("nan")},
        {"head": "tokens"},
        {"weights": (0.0, 0.0, 1.0)},
    ):
        with pytest.raises(ValueError, match="accepted"):
            MiningOptions(**options)  # type: ignore[arg-type]


def m3(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["mine", *(str(argument) for argument in arguments)])


def test_the_command_mines_what_the_function_does(model: M3Model, folder: Path, rows: Path, tmp_path: Path) -> None:
    options = MiningOptions(negatives=3, rank_range=(1, 9), relative_margin=0.01, fill=False, seed=2)
    mine_hard_negatives(model, rows, tmp_path / "expected.jsonl", options=options)
    arguments = ["-m", folder, rows, "-o", tmp_path / "out.jsonl", "--negatives", 3, "--ranks", "1-9", "--seed", 2]
    result = m3(*arguments, "--relative-margin", 0.01, "--no-fill", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"] == 60
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"text": f"{word} passage"}) + "\n" for word in WORDS))
    table = m3("-m", folder, rows, "-o", tmp_path / "pool.out", "--corpus", pool)
    assert table.exit_code == 0 and "corpus" in table.stdout
    assert any(f"{word} passage" in read(tmp_path / "pool.out")[0]["neg"] for word in WORDS)


def test_wrong_arguments_of_the_command_have_status_2(folder: Path, rows: Path, tmp_path: Path) -> None:
    good = ["-m", folder, rows, "-o", tmp_path / "out.jsonl"]
    wrong = (("--ranks", "9", "for --ranks"), ("--ranks", "9-3", "for --ranks"), ("--margin", "inf", "margin is inf"))
    for option, value, said in wrong:
        result = m3(*good, option, value)
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert m3(*good, "--head", "tokens").exit_code == m3(*good, "--margin", -1).exit_code == 2
    assert m3("-m", folder, rows, "-o", rows).exit_code == 2
    assert m3("-m", folder, "-", "-o", tmp_path / "out.jsonl").exit_code == 2


@pytest.mark.skipif(not all(map(find_spec, ("pymilvus", "milvus_lite"))), reason="pip install m3kernels[milvus]")
def test_an_index_in_milvus_mines_the_same_and_a_stopped_run_goes_on(
    model: M3Model, folder: Path, rows: Path, tmp_path: Path
) -> None:
    options = MiningOptions(negatives=3, rank_range=(1, 20), block=16)
    mine_hard_negatives(model, rows, tmp_path / "expected.jsonl", options=options)
    out, place = tmp_path / "out.jsonl", tmp_path / "mined.db"

    def stop(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("rows", 32):
            raise KeyboardInterrupt

    with MilvusIndex(place, "mine", width=model.config.hidden_size, fingerprint=fingerprint(model)) as index:
        with pytest.raises(KeyboardInterrupt):
            mine_hard_negatives(model, rows, out, options=options, milvus=index, progress=stop)
        with pytest.raises(ValueError, match="an unfinished run with other index; restart forgets it"):
            mine_hard_negatives(model, rows, out, options=options)
        with pytest.raises(ValueError, match="holds documents; accepted: an empty index"):
            mine_hard_negatives(model, rows, out, options=options, milvus=index, restart=True)
    good = ["-m", folder, rows, "-o", out, "--negatives", 3, "--ranks", "1-20", "--block", 16, "--milvus", place]
    result = m3(*good, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["resumed_rows"] == 32
    # Sums are added up in another order, so what scores the same may change places, and nothing else.
    found, expected = read(out), read(tmp_path / "expected.jsonl")
    assert [{**row, "neg": None} for row in found] == [{**row, "neg": None} for row in expected]
    queries = model.encode([row["query"] for row in found], role="query").dense
    for query, ours, theirs in zip(queries, found, expected):
        scores = [model.encode(row["neg"]).dense @ query for row in (ours, theirs)]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-5)
    assert not (tmp_path / "out.jsonl.mining").exists()
    out.unlink()
    refused = m3(*good)
    assert refused.exit_code == 1 and "accepted: an empty index" in refused.stderr
