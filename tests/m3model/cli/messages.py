"""What a command said on stderr, its frames and line breaks left out."""

from __future__ import annotations

from typer.testing import Result


def unwrapped(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())
