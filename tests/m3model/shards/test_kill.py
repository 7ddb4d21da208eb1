"""kill -9 at ten random moments: started again each time, `m3 encode` loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from m3model import M3Model
from m3model.shards import EncodedShards

# Imports are paid once: this process starts no thread, and forks a child that runs the command for every line of stdin.
_STARTER = """
import os, sys
import torch, torch._dynamo
import m3kernels, m3model.model, m3model.shards, m3model.cli.inputs, m3model.cli.output
from m3model.cli.app import app
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        sys.stdin.close()
        app(args=sys.argv[1:], prog_name="m3")
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_kill_at_ten_random_moments_loses_and_doubles_nothing(folder: Path, model: M3Model, tmp_path: Path) -> None:
    draw = random.Random(time.time_ns())  # other moments in every run
    words = ["the", "river", "city", "bridge", "matrix", "vector", "eigenvalue", "north", "south"]
    # So many that no machine is done before the tenth kill.
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 40))) for _ in range(2000)]
    source, out = tmp_path / "texts.jsonl", tmp_path / "encoded"
    source.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    arguments = ["encode", "-m", folder, source, "--out", out, "--multi-vector", "--shard-characters", "500"]
    command = [sys.executable, "-c", _STARTER, *map(str, arguments)]
    written: dict[str, tuple[int, int]] = {}
    ends = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdin is not None and starter.stdout is not None

        def start() -> int:
            starter.stdin.write("\n")
            starter.stdin.flush()
            return int(starter.stdout.readline())

        for attempt in range(10):
            child = start()
            more = draw.randint(0, 2) if attempt else 0  # the first is killed at the latest with the first shard
            limit = time.monotonic() + 20
            while len(list(out.glob("shard-*"))) < len(written) + more and time.monotonic() < limit:
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.02 if more else 0.5))
            os.kill(child, signal.SIGKILL)
            ends.append(int(starter.stdout.readline()))
            now = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("shard-*")}
            assert now.items() >= written.items(), "a shard that was done has gone or was written again"
            written = now
        missing_before_the_last = len(written)
        start()
        assert int(starter.stdout.readline()) == 0
        starter.stdin.close()
    assert ends == [-signal.SIGKILL] * 10, ends
    shards = EncodedShards(out)
    assert 0 < missing_before_the_last < len(list(shards))
    ids, encoded = shards.read()
    assert ids == [str(number) for number in range(len(texts))]
    assert not list(out.glob(".shard-*")), "a file of a killed run is left"
    expected = model.encode(texts)
    torch.testing.assert_close(torch.from_numpy(encoded.dense), torch.from_numpy(expected.dense), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded.multi_vector.rows, expected.multi_vector.rows, atol=1e-5, rtol=0)
    assert [list(entry) for entry in encoded.sparse.to_dicts()] == [list(entry) for entry in expected.sparse.to_dicts()]
