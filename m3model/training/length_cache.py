"""Token lengths of training files, kept from run to run: measuring millions of rows takes longer than reading them.

    FOLDER/KEY.npz    int32 [rows of the file], a member of a zip archive, whose checksum is checked on reading
    KEY               digest of the file's rows and of everything that their measure depends on

So a file that was changed, in whatever way, has another key, and one that was moved, copied or packed keeps its own. An
entry appears whole or not at all, and one that cannot be read is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3model.files import whole_file

__all__ = ["LengthCache"]

Lengths = NDArray[np.int32]

_FORMAT = 1
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class LengthCache:
    """Lengths by the digest of their file's rows."""

    def __init__(self, folder: Path, *measure: str | int) -> None:
        """
        Args:
            folder: where entries are kept; made when the first one is.
            measure: what a row's length depends on beside its texts: tokenizer, prefix, limits.
        """
        self._folder, self._measure = folder, measure

    def load(self, digest: str, rows: int) -> Lengths | None:
        """The lengths of a file's rows, or None."""
        try:
            with np.load(self._path(digest), allow_pickle=False) as stored:
                lengths: Lengths = stored["lengths"]
        except _DAMAGE:
            return None
        return lengths if lengths.shape == (rows,) and lengths.dtype == np.int32 else None

    def store(self, digest: str, lengths: Lengths) -> None:
        """Keep the lengths of a file's rows; warns where that cannot be done, for training can do without."""
        path = self._path(digest)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path, f"{socket.gethostname()}-{os.getpid()}") as file:
                np.savez(file, lengths=lengths)
        except OSError as error:
            warnings.warn(f"token lengths cannot be kept in {self._folder}: {error}", stacklevel=2)

    def _path(self, digest: str) -> Path:
        key = hashlib.sha256(json.dumps([_FORMAT, digest, *self._measure]).encode()).hexdigest()
        return self._folder / f"{key[:32]}.npz"
