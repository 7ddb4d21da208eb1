"""`--device cuda` of the benchmarks: where tensors lie, and calls that wait for a GPU to finish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Timer = Callable[[Callable[[], Any]], Any]
"""Benchmarks a call on the device."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the benchmarks run: cpu, cuda, cuda:1 ...")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name = str(request.config.getoption("--device"))
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    return name


@pytest.fixture
def timer(benchmark: Any, device: str) -> Timer:
    return lambda call: benchmark(waited_for(call, device))


def waited_for(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call, and on a GPU the wait until it is done: launches return at once."""
    if torch.device(device).type != "cuda":
        return call

    def waiting() -> Any:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return waiting
