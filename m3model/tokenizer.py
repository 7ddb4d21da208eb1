"""Texts to packed token ids, with the tokenizer files of a model folder.

The folder's tokenizer.json is used as it is, through the `tokenizers` library: transformers' own XLM-R class tokenizes
some texts (" ", literal special tokens) differently from one version to the next.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "Ids",
    "Pieces",
    "Role",
    "TextTokenizer",
    "Tokenized",
    "check_texts",
    "checked_strings",
    "warn_of_cuts",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
PART_CHARACTERS = 4_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPECIAL_ROLES = (("cls_token", "bos_token"), ("sep_token", "eos_token"), ("pad_token",), ("unk_token",))


Ids = NDArray[np.int32]
Role = Literal["query", "passage"]
"""Which of the model's prefixes goes before a text."""


class Tokenized(NamedTuple):
    """Token ids of each text, how many texts were cut, and the tokens of the longest before that."""

    ids: list[Ids]
    cut: int
    longest: int


class Pieces(NamedTuple):
    """Tokens of one text: ids int32 [n], and the characters at which they begin and end, int64 [n]."""

    ids: Ids
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


class TextTokenizer:
    """Tokenizer of a model folder.

    Attributes:
        files: name to contents of the folder's tokenizer files, kept so that a model can be saved without its source.
        special_ids: ids of cls, eos, pad and unk, the tokens that never enter a sparse vector.
        overhead: how many special tokens surround a text.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.backend: Tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        self.backend.no_padding()
        self.backend.no_truncation()
        self.special_ids = _special_ids(self.backend, files)
        self._prefix, self._suffix = _surroundings(self.backend)
        self.overhead = len(self._prefix) + len(self._suffix)

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """The tokenizer of a model folder.

        Raises:
            FileNotFoundError: the folder has no tokenizer.
            ValueError: its files cannot be read.
        """
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json; transformers' AutoTokenizer writes one from older tokenizer files:"
                " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        try:
            return cls(files)
        except Exception as error:
            raise ValueError(f"the tokenizer files in {folder} cannot be read: {error}") from error

    def __len__(self) -> int:
        """Number of ids, added tokens included."""
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    def digest(self) -> str:
        """Equal for tokenizers that make the same tokens of a text."""
        return hashlib.sha256(self.files["tokenizer.json"] + tokenizers.__version__.encode()).hexdigest()

    def token(self, token_id: int) -> str:
        """The piece of vocabulary with this id, such as "▁the".

        Raises:
            ValueError: there is none.
        """
        piece: str | None = self.backend.id_to_token(token_id)
        if piece is None:
            raise ValueError(f"token_id is {token_id}; the tokenizer has ids from 0 to {len(self) - 1}")
        return piece

    def decode(self, token_id: int) -> str:
        """The text of one token, without the mark of a word's beginning.

        Raises:
            ValueError: there is no such id.
        """
        self.token(token_id)
        text: str = self.backend.decode([token_id], skip_special_tokens=False)
        return text

    def encode(self, texts: Sequence[str], max_length: int, prefix: str = "") -> Tokenized:
        """Token ids of `prefix` + each text, special tokens around it, cut at the end to `max_length` ids.

        Lone surrogates, which no UTF-8 text can hold, become U+FFFD.

        Raises:
            TypeError: texts is no list of strings.
            ValueError: max_length leaves no room beside the special tokens.
        """
        check_texts(texts)
        self.check_max_length(max_length)
        room = max_length - self.overhead
        rows: list[Ids] = []
        cut = longest = 0
        for part in _parts(texts):
            prepared = [_encodable(prefix + text) for text in part]
            for encoding in self.backend.encode_batch_fast(prepared, add_special_tokens=False):
                ids = encoding.ids
                cut += len(ids) > room
                longest = max(longest, len(ids) + self.overhead)
                rows.append(self.enclosed(ids[:room]))
        return Tokenized(rows, cut, longest)

    def pieces(self, text: str) -> Pieces:
        """The tokens of a text without special ones, and where in the text each begins and ends.

        Lone surrogates count as U+FFFD, as in `encode`.
        """
        encoding = self.backend.encode(_encodable(text), add_special_tokens=False)
        bounds = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return Pieces(np.array(encoding.ids, dtype=np.int32), bounds[:, 0], bounds[:, 1])

    @property
    def leading(self) -> int:
        """How many special tokens stand before a text."""
        return len(self._prefix)

    def enclosed(self, ids: Sequence[int] | Ids) -> Ids:
        """`ids` with the special tokens of a text around them, the first of which is its cls token."""
        return np.array([*self._prefix, *ids, *self._suffix], dtype=np.int32)

    def check_max_length(self, max_length: int) -> None:
        """Raise ValueError unless max_length is a whole number with room for a token beside the special ones."""
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length <= self.overhead:
            raise ValueError(
                f"max_length is {max_length!r}; accepted: a whole number above the {self.overhead} special tokens"
            )

    def set_model_max_length(self, max_length: int) -> None:
        """Write `max_length` into tokenizer_config.json, where transformers takes its limit from."""
        settings = json.loads(self.files.get("tokenizer_config.json", b"{}"))
        settings["model_max_length"] = max_length
        self.files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()


def warn_of_cuts(parts: Sequence[Tokenized], max_length: int, *, stacklevel: int) -> None:
    """One warning that says how many texts of all parts were cut, if any was."""
    cut = sum(part.cut for part in parts)
    if cut:
        longest = max(part.longest for part in parts)
        warnings.warn(
            f"{cut} text{'s are' if cut > 1 else ' is'} longer than {max_length} tokens and cut there"
            f" (the longest has {longest})",
            stacklevel=stacklevel,
        )


def check_texts(texts: Sequence[str]) -> None:
    """Raise TypeError unless texts is a list (or another sequence) of strings."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a list of strings, got {type(texts).__name__}")
    for _ in checked_strings(texts):
        pass


def checked_strings(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each checked when it is reached: TypeError unless it is a string."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}] must be a string, got {type(text).__name__}")
        yield text


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Consecutive texts of about PART_CHARACTERS together; an encoding needs about 100 bytes a token while it lasts."""
    part: list[str] = []
    room = PART_CHARACTERS
    for text in texts:
        part.append(text)
        room -= len(text)
        if room <= 0:
            yield part
            part, room = [], PART_CHARACTERS
    yield part


def _encodable(text: str) -> str:
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _surroundings(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after every text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for begin in range(len(full) - len(bare) + 1):
        if full[begin : begin + len(bare)] == bare:
            break
    else:
        raise ValueError(f"special tokens change the text itself: {bare} becomes {full}")
    prefix, suffix = full[:begin], full[begin + len(bare) :]
    if not prefix:
        raise ValueError("it puts no token before a text, but the dense vector is the state of such a token")
    return prefix, suffix


def _special_ids(backend: Tokenizer, files: dict[str, bytes]) -> tuple[int, ...]:
    """Ids of cls, eos, pad and unk, as named by the folder's files and otherwise by their usual names."""
    named: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            named |= json.loads(files[name])
    ids: list[int] = []
    for role in _SPECIAL_ROLES:
        for key in role:
            content = named.get(key)
            content = content.get("content") if isinstance(content, dict) else content
            token_id = backend.token_to_id(content) if isinstance(content, str) else None
            if token_id is not None and token_id not in ids:
                ids.append(token_id)
    for usual in ("<s>", "</s>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[PAD]", "[UNK]") if not ids else ():
        token_id = backend.token_to_id(usual)
        if token_id is not None:
            ids.append(token_id)
    return tuple(ids)
