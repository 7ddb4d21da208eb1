"""One encoder in a process of its own, driven over stdin.

    python -m benchmarks.peers.encode PEER FOLDER TEXTS OUT

TEXTS is a JSON file with a list of texts; FOLDER the model. Lines in: {"first": true} encodes once, writes the dense
vectors to OUT (.npy) and answers {"bytes": rise of the resident peak, "resident": the peak, "seconds": s}; {"run":
true} answers {"seconds": s}. Padded peers get batches of BATCH texts sorted by length (1: nothing is padded). All use
THREADS threads and float32 weights but for those named int8 or bf16.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import _status, peak_memory

BATCH = 1
"""Texts of one padded batch. Of so few texts of so different lengths, 16 at a time pad 2000 tokens to 18000."""
THREADS = 2
MAX_LENGTH = 8192
Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""From texts to dense vectors, in their order; other outputs are computed and dropped."""


def _ours(quantize: Literal["int8", "bf16"] | None, all_outputs: bool = True) -> Callable[[Path], Encode]:
    def load(folder: Path) -> Encode:
        from m3model import M3Model

        model = M3Model.from_pretrained(folder, quantize=quantize)
        return lambda texts: model.encode(texts, sparse=all_outputs, multi_vector=all_outputs).dense

    return load


def flag_embedding(folder: Path) -> Encode:
    from FlagEmbedding import BGEM3FlagModel

    model = BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu", batch_size=BATCH)

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        wanted = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
        dense: NDArray[np.float32] = model.encode(list(texts), max_length=MAX_LENGTH, **wanted)["dense_vecs"]
        return dense

    return encode


def _transformers(attention: str) -> Callable[[Path], Encode]:
    def load(folder: Path) -> Encode:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()

        def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
            with torch.inference_mode():
                hidden = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state[:, 0]
                return torch.nn.functional.normalize(hidden, dim=-1).numpy()

        return _padded(folder, forward)

    return load


def sentence_transformers(folder: Path) -> Encode:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=MAX_LENGTH)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    return lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)


def _onnxruntime(name: str) -> Callable[[Path], Encode]:
    def load(folder: Path) -> Encode:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])

        def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
            return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

        return _padded(folder, forward)

    return load


def _padded(folder: Path, forward: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]) -> Encode:
    """Batches of BATCH texts of similar length, padded to the longest."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_LENGTH)
    padding = json.loads((folder / "config.json").read_text())["pad_token_id"]

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        dense: list[NDArray[np.float32] | None] = [None] * len(rows)
        for begin in range(0, len(order), BATCH):
            batch = order[begin : begin + BATCH]
            ids = np.full((len(batch), len(rows[batch[0]])), padding, dtype=np.int64)
            for place, number in enumerate(batch):
                ids[place, : len(rows[number])] = rows[number]
            for number, vector in zip(batch, forward(ids, (ids != padding).astype(np.int64))):
                dense[number] = vector
        return np.stack([vector for vector in dense if vector is not None])

    return encode


def export(folder: Path, attention: str = "eager") -> dict[str, Any]:
    """Write model.onnx (float32, fused by onnxruntime's transformer optimizer) and model.int8.onnx into the folder."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()

    class Dense(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids, attention_mask).last_hidden_state[:, 0]
            return torch.nn.functional.normalize(hidden, dim=-1)

    ids = torch.full((2, 7), 5)
    plain = folder / "plain.onnx"
    size = {0: "batch", 1: "length"}
    torch.onnx.export(
        Dense(),
        (ids, torch.ones_like(ids)),
        plain,
        input_names=["input_ids", "attention_mask"],
        output_names=["dense"],
        dynamic_axes={"input_ids": size, "attention_mask": size, "dense": {0: "batch"}},
        dynamo=False,
        opset_version=17,
    )
    config = model.config
    fused = optimize_model(
        str(plain), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    counts = {name: count for name, count in fused.get_fused_operator_statistics().items() if count}
    fused.save_model_to_file(str(folder / "model.onnx"))
    untyped = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of what comes out of fused nodes
    target = folder / "model.int8.onnx"
    quantize_dynamic(
        folder / "model.onnx", target, per_channel=True, weight_type=QuantType.QInt8, extra_options=untyped
    )
    plain.unlink()
    return counts


PEERS: dict[str, Callable[[Path], Encode]] = {
    "m3model": _ours(None),
    "m3model, dense only": _ours(None, all_outputs=False),
    "m3model bf16": _ours("bf16"),
    "m3model int8": _ours("int8"),
    "m3model int8, dense only": _ours("int8", all_outputs=False),
    "FlagEmbedding": flag_embedding,
    "transformers sdpa": _transformers("sdpa"),
    "transformers eager": _transformers("eager"),
    "sentence-transformers": sentence_transformers,
    "ONNX Runtime float32": _onnxruntime("model.onnx"),
    "ONNX Runtime int8": _onnxruntime("model.int8.onnx"),
}


def main(peer: str, folder: str, texts_file: str, out: str) -> None:
    torch.set_num_threads(THREADS)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    if peer == "export":
        print(json.dumps(export(Path(folder))), file=answers)
        return
    texts = json.loads(Path(texts_file).read_text())
    encode = PEERS[peer](Path(folder))
    encode(["warm-up"])
    for line in sys.stdin:
        if "first" in json.loads(line):
            begin = time.perf_counter()
            risen = peak_memory(lambda: np.save(out, encode(texts)))
            answer = {"bytes": risen, "resident": _status("VmHWM"), "seconds": time.perf_counter() - begin}
        else:
            begin = time.perf_counter()
            encode(texts)
            answer = {"seconds": time.perf_counter() - begin}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
