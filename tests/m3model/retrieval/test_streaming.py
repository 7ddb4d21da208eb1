"""Streamed ingest: idempotent, resumable, and nothing acknowledged is lost when the process is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from embeddings import random_embeddings
from streaming_writer import Encoder, documents, open_index

from m3model.retrieval import ExactIndex
from m3model.retrieval.milvus import MilvusIndex
from m3model.retrieval.streaming import ingest_stream

absent = [name for name in ("pymilvus", "milvus_lite") if importlib.util.find_spec(name) is None]
engines = [
    "exact",
    pytest.param("milvus", marks=pytest.mark.skipif(bool(absent), reason=f"{absent}; pip install m3kernels[milvus]")),
]
WRITER = Path(__file__).with_name("streaming_writer.py")


@pytest.mark.parametrize("engine", engines)
def test_a_stream_given_again_adds_only_what_is_new(engine: str, tmp_path: Path) -> None:
    encoder = Encoder()
    index, folder = open_index(engine, tmp_path)
    assert [len(ids) for ids in ingest_stream(index, documents(10), encoder, folder=folder, block=4)] == [4, 4, 2]
    assert encoder.encoded == list(range(10))
    list(ingest_stream(index, [*documents(10), *documents(13)], encoder, folder=folder, block=4))
    assert encoder.encoded == list(range(13)) and len(index) == 13
    list(ingest_stream(index, documents(2, version=1), encoder, folder=folder, block=4))
    assert encoder.encoded[13:] == [0, 1] and len(index) == 13
    if isinstance(index, MilvusIndex):
        index.close()
    again, _ = open_index(engine, tmp_path)
    assert len(again) == 13 and again.document("d12") == {"n": 12, "version": 0}
    assert again.document("d1") == {"n": 1, "version": 1}
    # The vectors too are those of the new content.
    asked = Encoder()([{"n": 1, "version": 1}])
    assert again.search(asked, 1, head="dense")[0].ids == ["d1"]
    if isinstance(again, MilvusIndex):
        again.close()


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder is for an ExactIndex"):
        list(ingest_stream(ExactIndex(), documents(1), Encoder()))
    with pytest.raises(ValueError, match="block is 0"):
        list(ingest_stream(ExactIndex(), documents(1), Encoder(), folder=str(tmp_path / "i"), block=0))
    twice = [("a", {"n": 1}), ("b", {"n": 3}), ("a", {"n": 2})]
    for block in (1, 3):
        with pytest.raises(ValueError, match="'a' comes twice with different contents"):
            list(ingest_stream(ExactIndex(), twice, Encoder(), folder=str(tmp_path / f"i{block}"), block=block))


@pytest.mark.parametrize("engine", engines)
def test_kill_loses_no_acknowledged_document_and_doubles_none(engine: str, tmp_path: Path) -> None:
    acknowledged: set[str] = set()
    for _ in range(2):
        command = [sys.executable, str(WRITER), engine, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        errors = (tmp_path / "errors").open("w+")
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert writer.stdout is not None
        target = len(acknowledged) + 40
        while len(acknowledged) < target and (line := writer.stdout.readline()):
            acknowledged.update(line.split())
        # Somewhere inside the next block.
        time.sleep(0.01 * (target % 7))
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged.update(writer.stdout.read().split())
        writer.wait()
        assert len(acknowledged) >= target, (tmp_path / "errors").read_text()[-2000:]
        index, _ = open_index(engine, tmp_path)
        assert all(document in index for document in acknowledged)
        found = index.search(random_embeddings(1, seed=5), len(index) + 10, head="dense")[0].ids
        assert len(found) == len(set(found)) == len(index)
        for document in sorted(acknowledged)[::20]:
            assert index.document(document)["n"] == int(document[1:])
        if isinstance(index, MilvusIndex):
            index.close()
