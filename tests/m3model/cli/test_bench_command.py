"""m3 bench: static facts without a GPU, refusals, and tuning with a device that is pretended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import unwrapped
from typer.testing import CliRunner, Result

pytest.importorskip("triton", reason="Triton is not installed")

from m3kernels import _tiles, compiled_tables, tuning
from m3kernels.compiled_facts import CompiledFacts
from m3kernels.compiled_tables import Entry
from m3model.cli.app import app

RECORD = Path(__file__).parents[3] / "benchmarks" / "results" / "gpu_static.json"


def m3(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, CompiledFacts]:
    """Facts out of the record instead of a compiler; what a test changes in them is what the command sees."""
    facts = {name: value for name, (_, value) in compiled_tables.read_record(RECORD)["entries"].items()}

    def compile_entries(entries: Any, cache: Path | None, advance: Any) -> dict[Entry, CompiledFacts]:
        return {entry: facts[entry.name] for entry in entries}

    monkeypatch.setattr(compiled_tables, "compile_entries", compile_entries)
    monkeypatch.setattr(compiled_tables, "library_entries", lambda architectures: {})
    return facts


def test_static_prints_a_table_and_writes_markdown(recorded: dict[str, CompiledFacts], tmp_path: Path) -> None:
    report = tmp_path / "made" / "static.md"
    result = m3("bench", "--static", "--op", "maxsim", "--arch", 90, "--markdown", report)
    assert result.exit_code == 0, result.stderr
    assert "maxsim/sm_90/forward/bf16/128/plain" in result.stdout and "attention" not in result.stdout
    assert "no spills, no product off tensor cores" in result.stderr
    assert "## maxsim, sm_90" in report.read_text() and "wgmma" in report.read_text()


def test_static_as_json_is_the_record(recorded: dict[str, CompiledFacts]) -> None:
    result = m3("bench", "--static", "--op", "attention", "--arch", 80, "--json")
    entries = json.loads(result.stdout)["entries"]
    assert len(entries) == len(list(compiled_tables.entries(["attention"], [80])))
    committed = json.loads(RECORD.read_text())["entries"]
    assert all(committed[name] == entry for name, entry in entries.items())


def test_a_spill_and_a_product_off_the_tensor_cores_give_status_1(recorded: dict[str, CompiledFacts]) -> None:
    name = "maxsim/sm_80/forward/bf16/128/plain"
    good = recorded[name]
    for changed, complaint in (
        ({"stack_bytes": 8}, "spills: 8 bytes of stack"),
        ({"fma_products": 1}, "a product runs off the tensor cores"),
        ({"shared_bytes": 200 << 10}, "does not fit"),
        ({"serialized_products": 2}, "wgmma products wait for each other"),
    ):
        recorded[name] = CompiledFacts(**{**vars(good), **changed})
        result = m3("bench", "--static", "--op", "maxsim", "--arch", 80)
        assert result.exit_code == 1
        assert f"{name}: {complaint}" in result.stderr.replace("\n", " ")
    assert compiled_tables.problems(CompiledFacts(**{**vars(good), "fma_products": 1}), "fp32") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --static and --tune"),
        (("--static", "--tune"), "give one of --static and --tune"),
        (("--static", "--arch", "75"), "75; accepted: 80, 86, 89, 90, 100"),
        (("--static", "--op", "sparse"), "sparse"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, ...], message: str) -> None:
    result = m3("bench", *arguments)
    assert result.exit_code == 2
    assert message in unwrapped(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_is_refused() -> None:
    result = m3("bench", "--tune")
    assert result.exit_code == 2 and "torch sees none here" in unwrapped(result)


def test_tuning_writes_the_table_of_its_architecture_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))

    def tune(op: str, device: torch.device, start: _tiles.TileTable, *, report: Any) -> _tiles.Entries:
        assert start.architecture == 80  # what serves sm_89 until it has a table of its own
        report("tuned")
        return {"forward": {"16bit": {"64": [1, 2, 3, 4]}}}

    monkeypatch.setattr(tuning, "tune", tune)
    result = m3("bench", "--tune", "--op", "attention", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    tables = json.loads((tmp_path / "attention.json").read_text())
    assert tables["sm_89"] == json.loads(result.stdout)["attention"]["entries"]
    assert {name: tables[name] for name in tables if name != "sm_89"} == json.loads(
        _tiles.path("attention").read_text()
    )


def test_without_a_cache_triton_compiles_anew_as_well(
    recorded: dict[str, CompiledFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    found = compiled_tables.compile_entries

    def compile_entries(*arguments: Any) -> Any:
        seen.append(os.environ.get("TRITON_CACHE_DIR"))
        return found(*arguments)

    monkeypatch.setattr(compiled_tables, "compile_entries", compile_entries)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/kept")
    for cache in ("--cache", "--no-cache"):
        assert m3("bench", "--static", "--op", "maxsim", "--arch", 90, cache).exit_code == 0
    assert seen[0] == "/kept" == os.environ["TRITON_CACHE_DIR"]
    assert seen[1] != "/kept" and not Path(str(seen[1])).exists()
