"""A training step of the embedded backbone: `python -m pytest benchmarks/bench_train.py`.

benchmarks/results/train.csv comes from `python -m benchmarks.report_train`, which takes turns with FlagEmbedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import train_cases

pytestmark = pytest.mark.skipif(
    not train_cases.DATA.is_file(), reason="no ../shared/data: real lengths are measured only"
)


@pytest.mark.parametrize("split", [None, 4096])
def test_step(benchmark: Callable[..., Any], split: int | None) -> None:
    from benchmarks.peers.training import training_step
    from m3model import M3Model

    model = M3Model.from_pretrained(train_cases.model_folder()).train()
    batch = {name: torch.from_numpy(array) for name, array in train_cases.real_batch(1).items()}
    benchmark(training_step(model, batch, split))
