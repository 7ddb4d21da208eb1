"""Fingerprints: of a model, what its three heads make of one fixed text; of a document, the hash of its JSON object.

Vectors of two models must not meet in one index. The fingerprint tells models apart by what counts, their output: it
covers encoder, heads, tokenizer, prefixes and pooling, costs one short forward pass, and bears the rounding of another
dtype or device, which a checksum of weight files would not.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from m3model.model import M3Model

__all__ = ["document_digest", "fingerprint", "same_model"]

PROBE = "The eigenvalues of a symmetric matrix are real. 对称矩阵的特征值是实数。 42"
TOLERANCE = 0.03
"""Largest relative distance of two fingerprints of one model: bfloat16 rounds some dozens of layers by 2**-9."""


def fingerprint(model: M3Model) -> str:
    """The fingerprint of `model`: dense vector, token weights and mean multi-vector row of PROBE, in base64."""
    out = model.encode([PROBE])
    assert out.dense is not None and out.sparse is not None and out.multi_vector is not None
    lexical = out.sparse.weights.numpy()
    rows = out.multi_vector.rows.float().mean(0).numpy()
    parts = [out.dense[0], lexical / max(float(np.linalg.norm(lexical)), 1e-9), rows]
    sizes = np.array([len(part) for part in parts], dtype="<f4")
    return base64.b64encode(np.concatenate([sizes, *parts]).astype("<f4").tobytes()).decode()


def same_model(left: str, right: str) -> bool:
    """Whether two fingerprints are of one model, up to rounding."""
    first, second = _numbers(left), _numbers(right)
    if first.shape != second.shape or not np.array_equal(first[:3], second[:3]):
        return False
    ends = np.cumsum(first[:3].astype(int))
    parts = zip(np.split(first[3:], ends[:-1]), np.split(second[3:], ends[:-1]))
    return all(np.linalg.norm(a - b) <= TOLERANCE * max(np.linalg.norm(a), np.linalg.norm(b)) for a, b in parts)


def document_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, the same for every order of its keys."""
    text = json.dumps(document, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")
