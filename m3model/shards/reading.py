"""EncodedShards: what `encode_shards` and `m3 encode --out FOLDER` have written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3model.embeddings import EncodedTexts, M3Embeddings
from m3model.retrieval.segment import Segment
from m3model.shards.files import present_shards, read_manifest, read_shard

__all__ = ["EncodedShards"]


class EncodedShards:
    """A finished encoding on disk; iteration gives its shards in the order of the input, mapped into memory.

    A shard has `ids` and `documents` (packed strings; `ids.strings()`, `document(number)`) and `embeddings`, an
    M3Embeddings of its documents.

    Attributes:
        fingerprint: of the model (m3model.retrieval.fingerprint).
        options: what was computed and how, such as "max_length" and "model".
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Open the folder.

        Args:
            verify: read each shard whole when it is reached and compare it with its checksum; False maps it only.

        Raises:
            FileNotFoundError: the folder holds no encoding.
            ValueError: the encoding is not finished, its manifest is damaged or of another version.
        """
        self.folder = Path(folder)
        self.verify = verify
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(f"{self.folder} holds no encoded texts; m3 encode --out FOLDER writes them")
        missing = set(range(manifest.shards)) - set(present_shards(self.folder))
        if missing:
            raise ValueError(
                f"the encoding in {self.folder} is not finished: {len(missing)} of {manifest.shards} shards are missing"
                f" (the first is number {min(missing)}); the same encoding, started again, makes them"
            )
        self.fingerprint = manifest.fingerprint
        self.options: dict[str, Any] = manifest.options
        self._texts: int = manifest.input["texts"]
        self._shards = manifest.shards

    def __len__(self) -> int:
        """Number of texts."""
        return self._texts

    def __iter__(self) -> Iterator[Segment]:
        """The shards.

        Raises:
            ValueError: a shard is damaged, or not the one that belongs there.
        """
        expected = 0
        for number in range(self._shards):
            origin, segment = read_shard(self.folder, number, verify=self.verify)
            if origin.first != expected or origin.texts != len(segment):
                raise ValueError(
                    f"shard {number} of {self.folder} has {len(segment)} texts from number {origin.first} on;"
                    f" expected {origin.texts} from number {expected} on"
                )
            expected += origin.texts
            yield segment
        if expected != self._texts:
            raise ValueError(f"the shards of {self.folder} have {expected} texts; the manifest says {self._texts}")

    def read(self) -> tuple[list[str], EncodedTexts]:
        """Ids and embeddings of all texts, in memory.

        Raises:
            ValueError: there is no text, or as iteration.
        """
        segments = list(self)
        if not segments:
            raise ValueError(f"{self.folder} holds the encoding of an empty input")
        ids = [document for segment in segments for document in segment.ids.strings()]
        return ids, M3Embeddings.concatenate([segment.embeddings for segment in segments])
