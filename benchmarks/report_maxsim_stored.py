"""Stored multi-vectors: what quantization costs in quality, and how much memory a mapped file takes. JSON results.

    python -m benchmarks.report_maxsim_stored quality XQUAD_FOLDER [query language] [queries]
    python -m benchmarks.report_maxsim_stored mapped FOLDER_WITH_7_GB [passages]

quality: questions of one language of XQuAD search the 240 English paragraphs with the untrained multi-vectors of the
embedded backbone (width 384); nDCG@10, one relevant paragraph each, and the error of all scores against float32.
mapped: 10 000 passages of 300 rows of 1024 bfloat16 in a file of 6.1 GB, scored by one query of 32 rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe, results_folder
from benchmarks.xquad import ndcg_at_10, paragraphs
from m3kernels import maxsim, quantize_rows

RESULTS = results_folder()


def quality(folder: Path, language: str = "ru", most: int = 400) -> dict[str, object]:
    from m3model import M3Model
    from m3model.embedded import make_embedded_backbone

    passages = [text for text, _ in paragraphs(folder / "xquad.en.json")]
    asked = [
        (question, i) for i, (_, own) in enumerate(paragraphs(folder / f"xquad.{language}.json")) for question in own
    ]
    asked = asked[:: max(1, len(asked) // most)][:most]
    with tempfile.TemporaryDirectory() as scratch:
        model = M3Model.from_pretrained(make_embedded_backbone(Path(scratch) / "model"))
    options = {"dense": False, "sparse": False, "multi_vector": True, "max_length": 512}
    embedded = [
        model.encode(texts, **options).multi_vector for texts in ([question for question, _ in asked], passages)
    ]
    rows, offsets = zip(*((torch.as_tensor(x), torch.as_tensor(y)) for x, y in embedded))
    relevant = torch.tensor([i for _, i in asked])
    exact = maxsim(rows[0], rows[1], *offsets)
    result: dict[str, object] = {
        "task": f"{len(asked)} questions in {language}, {len(passages)} English paragraphs, width {rows[0].shape[1]}",
        "float32": {"ndcg_at_10": round(ndcg_at_10(exact, relevant), 4), "bytes_per_row": 4 * rows[0].shape[1]},
    }
    for bits in (8, 1):
        stored = quantize_rows(rows[1], bits)  # type: ignore[arg-type]
        scores = maxsim(rows[0], stored, *offsets)
        error = (scores - exact).abs() / exact.abs()
        result["8 bits" if bits == 8 else "1 bit"] = {
            "ndcg_at_10": round(ndcg_at_10(scores, relevant), 4),
            "bytes_per_row": stored.codes.shape[1] + 4,
            "score_error_mean": round(float(error.mean()), 5),
            "score_error_max": round(float(error.max()), 5),
        }
    return result


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def mapped(folder: Path, passages: int = 10_000) -> dict[str, object]:
    rows, width = 300, 1024
    path = folder / "passages.bf16"
    wanted = passages * rows * width * 2
    if not path.exists() or path.stat().st_size != wanted:
        block = torch.nn.functional.normalize(torch.randn(100 * rows, width), dim=1).bfloat16()
        with path.open("wb") as file:
            for _ in range(passages // 100):
                file.write(block.view(torch.int16).numpy().tobytes())
        del block
    stored = torch.from_numpy(np.memmap(path, np.int16, "r")).view(torch.bfloat16).view(-1, width)
    queries = torch.nn.functional.normalize(torch.randn(32, width), dim=1).bfloat16()
    query_offsets = torch.tensor([0, 32], dtype=torch.int32)
    offsets = torch.arange(passages + 1, dtype=torch.int32) * rows
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        scores = maxsim(queries, stored, query_offsets, offsets)
        seconds.append(round(time.perf_counter() - begin, 2))
    # The file repeats 100 passages: every repetition scores the same.
    assert torch.equal(scores.view(-1, 100), scores[:, :100].expand(passages // 100, -1))
    return {
        "file_gb": round(wanted / 1e9, 2),
        "seconds": seconds,
        "gflops": round(2 * 32 * passages * rows * width / seconds[-1] / 1e9, 1),
        "peak_resident_gb": round(_status("VmHWM") / 1e9, 3),
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or arguments[0] not in ("quality", "mapped"):
        sys.exit(__doc__)
    part, folder, *rest = arguments
    if part == "quality":
        result = quality(Path(folder), *rest[:1], *map(int, rest[1:]))
    else:
        result = mapped(Path(folder), *map(int, rest))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "maxsim_stored.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept |= {part: result, "machine": describe()}
    path.write_text(json.dumps(kept, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
