"""Models and texts of the encoding benchmark.

Models have random weights in the shape of BAAI/bge-m3 (width 1024, 16 heads, FFN 4096) or of the embedded backbone
(width 384, 12 heads, FFN 1536), positions for 8192 tokens, and the embedded tokenizer cut to VOCABULARY pieces: the
word table takes no part in the speed, and seven peers hold one each. Texts come from ../shared/data (env M3_DATA).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.sparse_texts import CACHE, DATA

VOCABULARY = 32_000
MAX_LENGTH = 8192


class Shape(NamedTuple):
    """Sizes of an encoder."""

    width: int
    heads: int
    feed_forward: int
    layers: int

    def flops(self, lengths: list[int]) -> float:
        """Operations of the packed products and of attention, a multiply-add counted as two."""
        products = 2 * (4 * self.width**2 + 2 * self.width * self.feed_forward) * sum(lengths)
        attention = sum(4 * self.width * length**2 for length in lengths)
        return float(self.layers * (products + attention))


SHAPES = {"bge-m3": Shape(1024, 16, 4096, 24), "embedded": Shape(384, 12, 1536, 12)}


def shape_of(name: str, layers: int | None) -> Shape:
    """The named shape, with fewer layers if asked for: layers are alike, so speed by layer carries over."""
    shape = SHAPES[name]
    return shape if layers is None else shape._replace(layers=layers)


def model_folder(name: str, shape: Shape) -> Path:
    """A model folder in the layout of BAAI/bge-m3 with random weights, made when it is first asked for."""
    from m3model import M3Config, M3Model
    from m3model.tokenizer import TextTokenizer

    folder = CACHE / "encode" / f"{name}-{shape.layers}"
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config = M3Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        multi_vector_dim=shape.width,
    )
    M3Model(config, TextTokenizer(_tokenizer_files())).save_pretrained(folder)
    return folder


def texts(kind: str, tokens: int, folder: Path) -> list[str]:
    """Texts of about `tokens` tokens together, spread evenly over the data.

    queries: questions; paragraphs: their passages; documents: pages of a manual; mixed: a third of the tokens of each.
    """
    if kind == "mixed":
        kinds = ("queries", "paragraphs", "documents")
        return [text for part in kinds for text in texts(part, tokens // len(kinds), folder)]
    name, field = {"queries": ("qa", "query"), "paragraphs": ("qa", "pos"), "documents": ("manpages", "pos")}[kind]
    with gzip.open(DATA / "train" / f"{name}.jsonl.gz", "rt") as lines:
        rows = [json.loads(line)[field] for line in lines]
    found = [row if isinstance(row, str) else row[0] for row in rows]
    average = tokens / max(1, sum(lengths(found[:: len(found) // 100], folder)) / len(found[:: len(found) // 100]))
    step = len(found) / max(1.0, average)
    return [found[int(number * step)] for number in range(max(1, round(average)))]


def long_document(tokens: int, folder: Path) -> str:
    """Manual pages one after another, cut at `tokens` tokens."""
    from tokenizers import Tokenizer

    with gzip.open(DATA / "train" / "manpages.jsonl.gz", "rt") as lines:
        text = " ".join(json.loads(line)["pos"][0] for line, _ in zip(lines, range(40)))
    encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False)
    return text[: encoding.offsets[tokens - 3][1]]


def lengths(found: list[str], folder: Path) -> list[int]:
    """Tokens of each text, special ones included, at most MAX_LENGTH."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [min(len(encoding.ids), MAX_LENGTH) for encoding in tokenizer.encode_batch_fast(found)]


def _tokenizer_files() -> dict[str, bytes]:
    """Files of the embedded tokenizer, its vocabulary cut."""
    from m3model.embedded import make_embedded_backbone

    folder = CACHE / "embedded"
    if not (folder / "tokenizer.json").exists():
        make_embedded_backbone(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"] = values["model"]["vocab"][:VOCABULARY]
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < VOCABULARY]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    files = {"tokenizer.json": values, "tokenizer_config.json": settings}
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}
