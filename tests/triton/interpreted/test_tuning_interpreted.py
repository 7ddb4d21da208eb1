"""A dry run of the tuner: real kernels under the interpreter, with a clock that favours a known tile."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from m3kernels import _tiles, tuning

SMALL = tuning.Problem(sequences=2, length=20, heads=1, queries=2, query_length=3, passages=3, passage_length=9)
START = {
    "attention": ([32, 32, 4, 1], ("forward", "backward_q", "backward_kv")),
    "maxsim": ([32, 32, 512, 4, 1], ("forward", "pairs_forward", "backward_q", "backward_p")),
}


def start(op: str) -> _tiles.TileTable:
    tile, kernels = START[op]
    entries = {kernel: {"16bit": {"32": list(tile)}} for kernel in kernels}
    if op == "maxsim":
        entries["backward_q"]["16bit"]["32"] = [4, 32, 4, 1]
    return _tiles.TileTable(80, entries)


@pytest.mark.parametrize("op", ["attention", "maxsim"])
def test_the_fastest_candidate_is_taken_and_survives_the_file(op: str, tmp_path: Path) -> None:
    table = start(op)
    before = json.dumps(table.entries)
    candidates = {
        kernel: [[16, *widths["16bit"]["32"][1:]], [64, *widths["16bit"]["32"][1:]]]
        for kernel, widths in table.entries.items()
    }
    clock = iter(range(10**6, 0, -1))  # every later run is faster
    runs = []

    def timer(call: Callable[[], object]) -> float:
        call()
        runs.append(next(clock))
        return float(runs[-1])

    tuned = tuning.tune(
        op, torch.device("cpu"), table, timer=timer, candidates=candidates, problem=SMALL, report=lambda _: None
    )
    assert len(runs) == 3 * len(candidates)
    assert json.dumps(table.entries) == before
    path = tmp_path / "tiles.json"
    tuning.write_table(op, 86, {"forward": {"16bit": {"32": [1, 2, 3, 4]}}}, path)
    tuning.write_table(op, 90, tuned, path)
    tables = json.loads(path.read_text())
    assert tables["sm_90"] == tuned and tables["sm_86"] == {"forward": {"16bit": {"32": [1, 2, 3, 4]}}}


def test_entries_with_options_are_measured_with_them_and_listed_pairs_are_left() -> None:
    tile = [32, 32, 512, 4, 1]
    listed = {"32": tile, "32 save": tile, "32 floor+save": tile, "32 listed+save": tile}
    table = _tiles.TileTable(80, {"forward": {"16bit": listed}})
    asked: list[tuple[str, ...]] = []

    class Asked(_tiles.TileTable):
        def find(self, kernel, dtype, width, allow_tf32, options=()):  # type: ignore[no-untyped-def]
            asked.append(tuple(options))
            return super().find(kernel, dtype, width, allow_tf32, options)

    def timer(call: Callable[[], object]) -> float:
        call()
        return -float(len(asked))

    start = Asked(table.architecture, table.entries)
    tuned = tuning.tune(
        "maxsim", torch.device("cpu"), start, timer=timer, candidates={"forward": [[16, 32, 512, 4, 1]]},
        problem=SMALL, report=lambda _: None,
    )  # fmt: skip
    assert sorted(asked) == sorted(2 * [(), ("SAVE",), ("FLOOR", "SAVE")])
    assert tuned["forward"]["16bit"]["32 listed+save"] == tile


def test_a_tile_that_the_device_cannot_hold_is_passed_over() -> None:
    def timer(call: Callable[[], object]) -> float:
        raise OutOfResources(300_000, 232_448, "shared memory")

    table = start("attention")
    tuned = tuning.tune(
        "attention",
        torch.device("cpu"),
        table,
        timer=timer,
        candidates={"forward": [[128, 128, 4, 1]]},
        problem=SMALL,
        report=lambda line: line.index(str(math.inf)),
    )
    assert tuned == table.entries


def test_an_op_without_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="sparse_pool"):
        tuning.tune("sparse_pool", torch.device("cpu"), start("attention"))
