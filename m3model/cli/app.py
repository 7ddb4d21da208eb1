"""The typer application: all commands, and one place where an error becomes a line on stderr and an exit status."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from m3model.cli.bench import bench
from m3model.cli.data import data
from m3model.cli.demo import demo
from m3model.cli.doctor import doctor
from m3model.cli.encode import encode
from m3model.cli.eval import evaluate
from m3model.cli.explain import explain
from m3model.cli.index import index
from m3model.cli.mine import mine
from m3model.cli.score import score
from m3model.cli.search import search
from m3model.cli.train import train

__all__ = ["app"]

_REPORTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)


class _Commands(TyperGroup):
    """Reports the errors that the library raises on purpose in one line; --traceback shows where they come from."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort):
                raise
            except BrokenPipeError:
                # Whoever read our output has seen enough; nothing may be flushed to it at exit either.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(0) from None
            except _REPORTED as error:
                if ctx.params.get("traceback"):
                    raise
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(1) from None


def _show_warning(message: Warning | str, *_where: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="M3-Embedding: dense, sparse and multi-vector retrieval in one model.",
)


def _version(asked: bool) -> None:
    if asked:
        from m3kernels._version import __version__

        typer.echo(f"m3kernels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


for _command in (encode, index, search, score, explain, mine, doctor, bench, demo):
    app.command()(_command)
app.command("eval")(evaluate)
# Its options are those of transformers.TrainingArguments and more, read by argparse in the command itself.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.add_typer(data, name="data")
