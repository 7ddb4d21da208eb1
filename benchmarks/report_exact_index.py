"""ExactIndex at the size of bge-m3: synthetic dense (1024 wide) and sparse documents, ingested, mapped and searched.

    python -m benchmarks.report_exact_index FOLDER_WITH_ROOM ingest [documents]     adds what is missing, then stops
    python -m benchmarks.report_exact_index FOLDER_WITH_ROOM search                 measures single queries, writes JSON

Dense vectors are random unit vectors in float32; sparse ones have 64 token ids of a vocabulary of 250 002, drawn with
probabilities proportional to 1 / (rank + 10) as those of words are, with weights from 0.01 to 1.01. The index is saved
and mapped again after every block, so that what is stored does not stay in the process's own memory. Latency is that of
single queries on the mapped files: of the first (not all pages of the files in the page cache) and the median; memory
is the process's anonymous resident memory, which is what it needs, and its mapped pages, which the system takes back
when it wants them.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe, results_folder
from m3kernels import SparseBatch
from m3model import EncodedTexts, M3Embeddings
from m3model.retrieval import ExactIndex

RESULTS = results_folder()
WIDTH, TOKENS, VOCABULARY, BLOCK, QUERIES = 1024, 64, 250_002, 50_000, 16
FLATNESS = 10
HEADS = ("dense", "sparse", "dense+sparse")


def synthetic(count: int, seed: int, tokens: int = TOKENS) -> EncodedTexts:
    """Random embeddings of `count` texts of at most `tokens` different token ids."""
    generator = np.random.default_rng(seed)
    dense = generator.standard_normal((count, WIDTH), dtype=np.float32)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    # Ranks by the inverse of the distribution function log(1 + r / FLATNESS) / log(1 + VOCABULARY / FLATNESS).
    uniform = generator.random((count, tokens))
    ids = (FLATNESS * np.expm1(uniform * np.log1p(VOCABULARY / FLATNESS))).astype(np.int32)
    ids.sort(axis=1)
    kept = np.ones(ids.shape, dtype=np.bool_)
    kept[:, 1:] = ids[:, 1:] != ids[:, :-1]
    offsets = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(kept.sum(axis=1), out=offsets[1:])
    weights = generator.random(int(offsets[-1]), dtype=np.float32) + np.float32(0.01)
    batch = SparseBatch(torch.from_numpy(ids[kept]), torch.from_numpy(weights), torch.from_numpy(offsets))
    return M3Embeddings(dense, batch)


def memory(field: str) -> float:
    """A field of /proc/self/status in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 2**20, 2)
    raise ValueError(f"no {field} in /proc/self/status")


def ingest(folder: Path, documents: int) -> None:
    """Add the documents that are missing, in blocks; what it measured so far lies beside the index."""
    path, notes = folder / "index", folder / "ingest.json"
    index = ExactIndex.load(path, verify=False) if path.exists() else ExactIndex()
    facts: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {"seconds": 0.0, "anonymous_gib": 0.0}
    while (first := len(index)) < documents:
        count = min(BLOCK, documents - first)
        block = synthetic(count, seed=first + 1)
        begin = time.perf_counter()
        index.add([f"d{number}" for number in range(first, first + count)], block)
        index.save(path)
        facts["anonymous_gib"] = max(facts["anonymous_gib"], memory("RssAnon"))
        index = ExactIndex.load(path, verify=False)
        facts["seconds"] += time.perf_counter() - begin
        notes.write_text(json.dumps(facts))
        print(f"{first + count} documents, {facts['seconds']:.0f} s", file=sys.stderr, flush=True)


def search(folder: Path) -> None:
    begin = time.perf_counter()
    index = ExactIndex.load(folder / "index", verify=False)
    ingested = json.loads((folder / "ingest.json").read_text())
    facts: dict[str, Any] = {
        "machine": describe(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "documents": len(index),
        "width": WIDTH,
        "tokens": TOKENS,
        "index_gib": round(index.nbytes / 2**30, 2),
        "ingest_seconds": round(ingested["seconds"], 1),
        "ingest_anonymous_gib": ingested["anonymous_gib"],
        "open_seconds": round(time.perf_counter() - begin, 1),
        "open_anonymous_gib": memory("RssAnon"),
    }
    queries = synthetic(QUERIES, seed=0, tokens=24)
    for head in HEADS:
        seconds = []
        for number in range(QUERIES):
            start = time.perf_counter()
            index.search(queries.select([number]), 100, head=head)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        index.search(queries, 100, head=head)
        together = (time.perf_counter() - start) / QUERIES
        facts[head] = {
            "first_ms": round(1000 * seconds[0], 2),
            "median_ms": round(1000 * median(seconds[1:]), 2),
            f"of_{QUERIES}_together_ms": round(1000 * together, 2),
        }
        print(head, facts[head], file=sys.stderr, flush=True)
    facts["search_anonymous_gib"] = memory("RssAnon")
    facts["search_mapped_gib"] = memory("RssFile")
    facts["peak_resident_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    name = "exact_index_1m.json" if len(index) == 1_000_000 else f"exact_index_{len(index)}.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    place, task = Path(sys.argv[1]), sys.argv[2]
    if task == "ingest":
        place.mkdir(parents=True, exist_ok=True)
        ingest(place, int(sys.argv[3]) if len(sys.argv) > 3 else 1_000_000)
    else:
        search(place)
