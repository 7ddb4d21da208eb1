"""nDCG@10 of the embedded backbone's dense vectors on XQuAD, by precision of its linear layers: quantized_ndcg.json.

    python -m benchmarks.report_quantized LANGUAGE...        # of ../shared/data/test/xquad (env M3_DATA)

Questions in each of the languages are asked of the paragraphs in each of them; a question has one paragraph that
answers it. Prefixes and pooling are the backbone's own. A file that is there is written anew.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import describe
from benchmarks.report_encode import RESULTS
from benchmarks.sparse_texts import CACHE, DATA
from benchmarks.xquad import ndcg_at_10, paragraphs


def main(languages: list[str]) -> None:
    from m3model import M3Model
    from m3model.embedded import make_embedded_backbone

    folder = CACHE / "embedded"
    if not (folder / "config.json").exists():
        make_embedded_backbone(folder)
    torch.set_num_threads(2)
    texts = {language: questions_and_paragraphs(language) for language in languages}
    encoded: dict[str, dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]] = {}
    for precision in ("float32", "int8"):
        model = M3Model.from_pretrained(folder, quantize=None if precision == "float32" else "int8", init_heads=True)
        dense: dict[str, Any] = {"sparse": False, "multi_vector": False}
        encoded[precision] = {
            language: (model.encode(asked, role="query", **dense).dense, model.encode(passages, **dense).dense)
            for language, (asked, passages, _) in texts.items()
        }
    rows = []
    for asked_in in languages:
        for found_in in languages:
            answers = texts[asked_in][2]
            values = {
                name: ndcg_at_10(torch.from_numpy(vectors[asked_in][0] @ vectors[found_in][1].T), answers)
                for name, vectors in encoded.items()
            }
            rows.append({"questions": asked_in, "paragraphs": found_in, "queries": len(answers), **values})
    mean = {name: float(np.mean([row[name] for row in rows])) for name in encoded}
    exact = encoded["float32"]
    cosine = {
        name: min(float((part * like).sum(1).min()) for la in languages for part, like in zip(vectors[la], exact[la]))
        for name, vectors in encoded.items()
    }
    result = {"measure": "nDCG@10", "rows": rows, "mean": mean, "least_cosine": cosine, "machine": describe()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quantized_ndcg.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(*(f"{value:.4f}" if isinstance(value, float) else value for value in row.values()), sep="\t")
    print(mean, cosine, sep="\n")


def questions_and_paragraphs(language: str) -> tuple[list[str], list[str], torch.Tensor]:
    """Questions, paragraphs, and the number of each question's paragraph."""
    read = paragraphs(DATA / "test" / "xquad" / f"xquad.{language}.json")
    asked, answers = zip(*((question, number) for number, (_, own) in enumerate(read) for question in own))
    return list(asked), [text for text, _ in read], torch.tensor(answers)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
