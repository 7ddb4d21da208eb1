"""Runs inside the environment of the official FlagEmbedding: what it computes on a model folder, written as npz.

    python oracle.py REQUEST.json RESULT.npz

REQUEST: {"folder", "texts", "pairs": [[query, passage], ...], "weights", "max_length", "pooling"}.
RESULT: dense; ids, weights, entries (their number in each text); rows, row_counts; scores of the pairs in one padded
batch ("batch ...") and one by one ("single ..."); lexical and colbert: the official helper functions, on all texts and
on the first two; tokens: those of the first text, as JSON.
"""

import json
import sys

import numpy as np
from FlagEmbedding import BGEM3FlagModel


def main(request_path: str, result_path: str) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    model = BGEM3FlagModel(
        request["folder"],
        use_fp16=False,
        devices="cpu",
        pooling_method=request["pooling"],
        query_max_length=request["max_length"],
        passage_max_length=request["max_length"],
    )
    texts, pairs = request["texts"], [tuple(pair) for pair in request["pairs"]]
    out = model.encode(texts, batch_size=4, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    lexical = [sorted((int(token), float(weight)) for token, weight in row.items()) for row in out["lexical_weights"]]
    entries = [entry for row in lexical for entry in row]
    tokens = model.convert_id_to_token(out["lexical_weights"][:1])
    arrays = {
        "dense": out["dense_vecs"],
        "ids": np.array([token for token, _ in entries], dtype=np.int64),
        "weights": np.array([weight for _, weight in entries], dtype=np.float64),
        "entries": np.array([len(row) for row in lexical]),
        "rows": np.concatenate(out["colbert_vecs"]),
        "row_counts": np.array([len(rows) for rows in out["colbert_vecs"]]),
        "lexical": np.array(model.compute_lexical_matching_score(out["lexical_weights"], out["lexical_weights"])),
        "colbert": np.array(float(model.colbert_score(out["colbert_vecs"][0], out["colbert_vecs"][1]))),
        "tokens": np.array(json.dumps({token: float(weight) for token, weight in tokens.items()})),
    }
    weights = request["weights"]
    batch = model.compute_score(pairs, batch_size=len(pairs), weights_for_different_modes=weights)
    singles = [model.compute_score(pair, weights_for_different_modes=weights) for pair in pairs]
    for name, scores in batch.items():
        arrays[f"batch {name}"] = np.array(scores)
        arrays[f"single {name}"] = np.array([single[name] for single in singles])
    np.savez(result_path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
