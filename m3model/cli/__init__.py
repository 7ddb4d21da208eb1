"""The command line: `m3 encode | index | search | score | explain | eval | doctor | demo`.

Results go to stdout, as a table or with --json as JSON; progress, warnings and errors go to stderr. Exit status 0:
done, 1: failed, 2: bad arguments. torch and the model are imported by the commands that need them, not by `m3 --help`.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command of sys.argv."""
    from m3model.cli.app import app

    app(prog_name="m3")
