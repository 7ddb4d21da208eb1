"""ExactIndex at the size of bge-m3: synthetic dense (1024 wide) and sparse documents, ingested, mapped and searched.

    python -m benchmarks.report_exact_index FOLDER_WITH_ROOM [documents]

Dense vectors are random unit vectors in float32; sparse ones have 64 token ids spread over a vocabulary of 250 002. The
index is saved and mapped again after every block, so that what is stored does not stay in the process's own memory.
Latency is that of single queries on the mapped files, first (files not all in the page cache) and median; memory is the
process's anonymous resident memory, which is what it needs, beside the page cache, which the system takes back.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.machine import describe
from m3kernels import SparseBatch
from m3model import EncodedTexts, M3Embeddings
from m3model.retrieval import ExactIndex

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH, TOKENS, VOCABULARY, BLOCK, QUERIES = 1024, 64, 250_002, 50_000, 8


def synthetic(count: int, seed: int, tokens: int = TOKENS) -> EncodedTexts:
    """Random embeddings of `count` texts."""
    generator = np.random.default_rng(seed)
    dense = generator.standard_normal((count, WIDTH), dtype=np.float32)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    gaps = generator.integers(1, 2 * (VOCABULARY // tokens) - 1, (count, tokens), dtype=np.int32)
    ids = gaps.cumsum(axis=1, dtype=np.int64) % VOCABULARY
    ids.sort(axis=1)
    # Wrapped ids can meet: they are moved apart by one, which keeps them sorted.
    ids = np.maximum.accumulate(ids - np.arange(tokens), axis=1) + np.arange(tokens)
    weights = generator.random(count * tokens, dtype=np.float32) + np.float32(0.01)
    offsets = np.arange(count + 1, dtype=np.int32) * np.int32(tokens)
    batch = SparseBatch(
        torch.from_numpy(ids.astype(np.int32).reshape(-1)), torch.from_numpy(weights), torch.from_numpy(offsets)
    )
    return M3Embeddings(dense, batch)


def memory(field: str) -> float:
    """A field of /proc/self/status in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 2**20, 2)
    raise ValueError(f"no {field} in /proc/self/status")


def main(folder: Path, documents: int = 1_000_000) -> None:
    path = folder / "index"
    index, largest, begin = ExactIndex(), 0.0, time.perf_counter()
    for first in range(0, documents, BLOCK):
        count = min(BLOCK, documents - first)
        index.add([f"d{number}" for number in range(first, first + count)], synthetic(count, seed=first + 1))
        index.save(path)
        largest = max(largest, memory("RssAnon"))
        index = ExactIndex.load(path, verify=False)
        print(
            f"{first + count} documents, {time.perf_counter() - begin:.0f} s, {largest} GiB",
            file=sys.stderr,
            flush=True,
        )
    ingest_seconds = time.perf_counter() - begin
    queries = synthetic(QUERIES, seed=0, tokens=24)
    facts: dict[str, object] = {
        "machine": describe(),
        "documents": len(index),
        "width": WIDTH,
        "tokens": TOKENS,
        "index_gib": round(index.nbytes / 2**30, 2),
        "ingest_seconds": round(ingest_seconds, 1),
        "ingest_anonymous_gib": largest,
    }
    for head in ("dense", "sparse", "dense+sparse"):
        seconds = []
        for number in range(QUERIES):
            start = time.perf_counter()
            index.search(queries.select([number]), 100, head=head)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        index.search(queries, 100, head=head)
        together = (time.perf_counter() - start) / QUERIES
        facts[head] = {
            "first_ms": round(1000 * seconds[0]),
            "median_ms": round(1000 * median(seconds[1:])),
            f"of_{QUERIES}_together_ms": round(1000 * together),
        }
        print(head, facts[head], file=sys.stderr, flush=True)
    facts["search_anonymous_gib"] = memory("RssAnon")
    name = RESULTS / "exact_index_1m.json" if documents == 1_000_000 else RESULTS / f"exact_index_{documents}.json"
    name.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:3]))
