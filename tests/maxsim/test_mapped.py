"""Passages in a memory-mapped file are read in place, window by window, and do not stay resident."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import m3kernels
from m3kernels.maxsim import mapped
from tests.maxsim.cases import offsets_of, ragged_batch

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


@linux_only
@pytest.mark.parametrize("shared", [True, False])
def test_windows_of_a_mapped_file_give_the_scores_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    monkeypatch.setattr(mapped, "WINDOW_BYTES", 8192)
    batch = ragged_batch([5, 9], [40, 0, 300, 1, 77, 0], 64).to(torch.bfloat16)
    path = tmp_path / "rows.bf16"
    batch.passages.view(torch.int16).numpy().tofile(path)
    rows = torch.from_file(str(path), shared=shared, size=batch.passages.numel(), dtype=torch.bfloat16).view(-1, 64)
    spans = list(mapped.windows(rows, batch.passage_offsets))
    # 8192 bytes are 64 rows: the longer passages are windows of their own.
    assert spans == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    for floor in (False, batch.zero_floor):
        expected = m3kernels.maxsim(*batch.rows, zero_floor=floor)
        found = m3kernels.maxsim(batch.queries, rows, batch.query_offsets, batch.passage_offsets, zero_floor=floor)
        assert torch.equal(found, expected)


@linux_only
def test_a_private_mapping_keeps_what_was_written_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "WINDOW_BYTES", 4096)
    path = tmp_path / "rows.f32"
    np.zeros((512, 64), np.float32).tofile(path)
    rows = torch.from_file(str(path), shared=False, size=512 * 64).view(512, 64)
    rows.fill_(1.0)
    arguments = (torch.ones(1, 64), rows, offsets_of([1]), offsets_of([128] * 4))
    assert m3kernels.maxsim(*arguments).tolist() == [[64.0] * 4]
    assert m3kernels.maxsim(*arguments).tolist() == [[64.0] * 4]


@linux_only
def test_tensors_in_memory_are_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "WINDOW_BYTES", 4096)
    assert list(mapped.windows(torch.zeros(512, 64), offsets_of([256, 256]))) == [(0, 2)]


RESIDENT = """
import sys
import numpy, torch
import m3kernels

path, width, lengths = sys.argv[1], 1024, [300] * 600
torch.set_num_threads(2)


def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(kind))


rows = torch.from_numpy(numpy.memmap(path, numpy.int16, "r")).view(torch.bfloat16).view(-1, width)
queries = torch.ones(16, width, dtype=torch.bfloat16)
offsets = torch.tensor([0, 16], dtype=torch.int32), torch.arange(0, 601, dtype=torch.int32) * 300
before = resident("VmRSS")
scores = m3kernels.maxsim(queries, rows, *offsets)
assert torch.equal(scores, torch.full((1, 600), 0.0)), scores
print(rows.nbytes, resident("VmHWM") - before)
"""


@linux_only
def test_resident_memory_stays_far_below_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "passages.bf16"
    with open(path, "wb") as file:
        # 600 passages of 300 rows of 1024 bfloat16 zeros: 369 MB, a hole on disk.
        file.truncate(600 * 300 * 1024 * 2)
    script = RESIDENT.replace("import m3kernels\n", "from m3kernels.maxsim import mapped\nimport m3kernels\n", 1)
    script = script.replace("torch.set_num_threads", "mapped.WINDOW_BYTES = 32 << 20\ntorch.set_num_threads")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    size, grown = map(int, run.stdout.split())
    assert size == 600 * 300 * 1024 * 2
    # A window, and what is fetched around it.
    assert grown < 96 << 20, f"{grown} bytes resident for a file of {size}"
