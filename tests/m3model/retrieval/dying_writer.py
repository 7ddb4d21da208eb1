"""A program that changes an ExactIndex and saves it, killed (kill -9) at one of the moments at which it flushes a file.

python dying_writer.py FOLDER MOMENT add|upsert ID
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from random_texts import random_texts

from m3model.retrieval import ExactIndex


def killed_writer(folder: Path, moment: int, change: Literal["add", "upsert"], name: str) -> int:
    """Run the program; 0 if it ended before the moment, -9 if it was killed."""
    command = [sys.executable, __file__, str(folder), str(moment), change, name]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def main(folder: str, moment: str, change: str, name: str) -> None:
    left, flush = int(moment), os.fsync

    def counted(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = counted
    index = ExactIndex.load(folder)
    getattr(index, change)([name], random_texts(1, 50), [{"new": 1}])
    index.save(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
