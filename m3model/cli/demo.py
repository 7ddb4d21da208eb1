"""m3 demo: the demonstration (m3model.demo)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TOKENS = 210_000
STEPS = 60


def demo(
    folder: Annotated[
        Path, typer.Option(help="Where model, collection and index go; a second run reuses them.")
    ] = Path("demo"),
    tokens: Annotated[int, typer.Option(min=20_000, help="Tokens of documentation to encode.")] = TOKENS,
    steps: Annotated[int, typer.Option(min=0, help="Steps of training.")] = STEPS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training.")] = 1,
) -> None:
    """Search the documentation of torch and numpy by meaning, in eight languages, with a model trained on the spot."""
    from m3model.demo import run_demo

    run_demo(folder, tokens, steps, seed)
