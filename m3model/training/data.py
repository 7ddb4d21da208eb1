"""Training rows: the JSON lines of FlagEmbedding, checked with file and line, read lazily from disk.

    {"query": str, "pos": [str, ...], "neg": [str, ...],          neg may be left out: a row without negatives
     "pos_scores": [float, ...], "neg_scores": [float, ...],      of a teacher, raw; both or none
     "prompt": str, "type": str}                                  other keys are passed over

Files end in .jsonl or .json, as they are or packed (.gz, .bz2, .xz, .zst). A TrainingDataset keeps about 32 bytes a row
in memory: where its line lies in the file, its length and its task. A packed file has no places to read from, so it is
unpacked once into a folder of its own under the temporary directory (TMPDIR), and found there by the next run.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = [
    "DataSource",
    "TrainingDataError",
    "TrainingDataset",
    "TrainingLine",
    "TrainingRow",
    "largest_group",
    "open_training_file",
    "parse_object",
    "parse_training_row",
    "read_training_rows",
    "row_from_object",
    "training_lines",
]

Lengths = NDArray[np.int32]

_UNPACKING = (EOFError, OSError, zlib.error, lzma.LZMAError)


class TrainingDataError(ValueError):
    """A training file that cannot be used; says file, line and what is wrong."""


@dataclass(frozen=True)
class TrainingRow:
    """A query, passages that answer it and passages that do not.

    Attributes:
        positive_scores, negative_scores: a teacher's scores of the passages, one each, or None.
        prompt: instruction before this query, in place of the collator's; None: the collator's.
        type: kind of task as FlagEmbedding names it ("only_1neg", "symmetric_sts" ...), or None.
        index: of the row in its file or dataset; what is drawn for a row depends on it.
        location: file:line.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    positive_scores: tuple[float, ...] | None
    negative_scores: tuple[float, ...] | None
    prompt: str | None
    type: str | None
    index: int = -1
    location: str = ""


@dataclass(frozen=True)
class DataSource:
    """A training file.

    Attributes:
        path: JSON lines, perhaps packed.
        name: in logs; default the file's name without its endings.
        weight: how often its rows come in an epoch: 1 once, 2.5 twice and half of them a third time.
        batch_size: rows of a batch of this source on each rank; default that of the sampler.
    """

    path: str | os.PathLike[str]
    name: str | None = None
    weight: float = 1.0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)):
            raise TypeError(f"path must be a path, got {type(self.path).__name__}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise TypeError(f"weight must be a number, got {type(self.weight).__name__}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight is {self.weight}; accepted: a finite number above 0")
        size = self.batch_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"batch_size is {size!r}; accepted: a whole number of at least 1, or None")
        if self.name is None:
            object.__setattr__(self, "name", Path(self.path).name.split(".")[0])


class TrainingLine(NamedTuple):
    """A line that is not blank: its number from 1, where it begins in the unpacked file, and its bytes."""

    number: int
    begin: int
    content: bytes


def read_training_rows(path: str | os.PathLike[str]) -> Iterator[TrainingRow]:
    """The rows of a file one after another, none kept.

    Raises:
        FileNotFoundError: there is no such file.
        TrainingDataError: a bad row, a damaged packed file, or no row at all.
        ImportError: a .zst file, and no package that reads it.
    """
    path = Path(path)
    index = 0
    with open_training_file(path) as file:
        for line in training_lines(file, path):
            yield parse_training_row(line, path, index)
            index += 1
    if not index:
        raise _empty(path)


class TrainingDataset(torch.utils.data.Dataset[TrainingRow]):
    """Rows of several files, all checked when it is made, read from disk when asked for.

    Attributes:
        sources: as given.
        digests: of the rows of each source, equal for files of equal rows.
        character_lengths: int32 [N], characters of the longest text of each row.
        negative_counts: int32 [N], negatives of each row.
        tasks: int32 [N]; rows of equal numbers may share a batch: one source, one type, groups of one size, and all of
            them with a teacher's scores or none.
        task_sources: the source of each task.
        answer_groups: int32 [N]; rows of equal numbers share a query or a positive, perhaps by way of other rows. In
            one batch the positive of one would be a negative of the other.
    """

    def __init__(self, sources: Sequence[DataSource]) -> None:
        """Read and check every row once.

        Raises:
            ValueError: no source.
            TypeError: a source is no DataSource.
            FileNotFoundError, TrainingDataError, ImportError: as `read_training_rows`.
            OSError: no room to unpack a file.
        """
        if not sources:
            raise ValueError("sources is empty; at least one DataSource is needed")
        for source in sources:
            if not isinstance(source, DataSource):
                raise TypeError(f"sources must hold DataSource, got {type(source).__name__}")
        self.sources = tuple(sources)
        self._files = [_PlainFile(Path(source.path)) for source in sources]
        begins, sizes, lines = array("q"), array("I"), array("I")
        lengths, negatives, tasks = array("i"), array("i"), array("i")
        shared, shared_rows = array("Q"), array("i")
        task_numbers: dict[tuple[int, str | None, int | None, bool], int] = {}
        ends: list[int] = []
        digests: list[str] = []
        for number, file in enumerate(self._files):
            content = hashlib.blake2b(digest_size=16)
            with file.path.open("rb") as stream:
                for line in training_lines(stream, file.shown):
                    content.update(line.content)
                    row = parse_training_row(line, file.shown, len(begins))
                    shared.extend(_digests(row))
                    shared_rows.extend([len(begins)] * (1 + len(row.positives)))
                    begins.append(line.begin)
                    sizes.append(len(line.content))
                    lines.append(line.number)
                    texts = (row.query, *row.positives, *row.negatives)
                    lengths.append(min(max(map(len, texts)), 2**31 - 1))
                    negatives.append(len(row.negatives))
                    task = (number, row.type, largest_group(row), row.positive_scores is not None)
                    tasks.append(task_numbers.setdefault(task, len(task_numbers)))
            if len(begins) == (ends[-1] if ends else 0):
                raise _empty(file.shown)
            ends.append(len(begins))
            digests.append(content.hexdigest())
        self.digests = tuple(digests)
        self._ends = np.array(ends)
        self._begins, self._sizes, self._lines = (np.array(column) for column in (begins, sizes, lines))
        self.character_lengths: Lengths = np.array(lengths, dtype=np.int32)
        self.negative_counts: Lengths = np.array(negatives, dtype=np.int32)
        self.tasks: Lengths = np.array(tasks, dtype=np.int32)
        self.task_sources = tuple(task[0] for task in task_numbers)
        self.answer_groups = _connected(np.array(shared), np.array(shared_rows), len(self))

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> TrainingRow:
        """The row of a number from 0 to N - 1.

        Raises:
            IndexError: there is none.
            TrainingDataError: the file was changed since the dataset was made.
        """
        source = self.source_of(index)
        number, begin = int(self._lines[index]), int(self._begins[index])
        content = self._files[source].read(begin, int(self._sizes[index]))
        return parse_training_row(TrainingLine(number, begin, content), self._files[source].shown, int(index))

    def source_of(self, index: int) -> int:
        """Number of the source that row `index` comes from.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; the dataset has rows 0 to {len(self) - 1}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def rows_of(self, source: int) -> range:
        """Numbers of the rows of source number `source`."""
        return range(int(self._ends[source - 1]) if source else 0, int(self._ends[source]))

    def location(self, index: int) -> str:
        """file:line of row `index`."""
        return f"{self._files[self.source_of(index)].shown}:{self._lines[index]}"

    def check_negatives(self, group_size: int) -> None:
        """Raise TrainingDataError if groups of `group_size` passages are asked for and a row has no negative."""
        absent = np.flatnonzero(self.negative_counts == 0)
        if group_size > 1 and len(absent):
            raise TrainingDataError(
                f"{self.location(int(absent[0]))}: the row has no negatives ({len(absent)} of {len(self)} rows), but"
                f" group_size is {group_size}; mine some with m3 mine, or train with group_size 1"
            )


def parse_training_row(line: TrainingLine, path: str | os.PathLike[str], index: int = -1) -> TrainingRow:
    """The row of one line.

    Raises:
        TrainingDataError: it is none; names path and line.
    """
    return row_from_object(parse_object(line, path), f"{path}:{line.number}", index)


def row_from_object(row: dict[str, Any], location: str, index: int = -1) -> TrainingRow:
    """The row of a JSON object.

    Raises:
        TrainingDataError: it is none; names the location.
    """
    query = _text(row, "query", location)
    positives = _texts(row, "pos", location)
    if not positives:
        raise TrainingDataError(f"{location}: 'pos' is empty; at least one passage is needed")
    negatives = _texts(row, "neg", location) if row.get("neg") is not None else ()
    positive_scores = _scores(row, "pos_scores", len(positives), location)
    negative_scores = _scores(row, "neg_scores", len(negatives), location)
    if negatives and (positive_scores is None) != (negative_scores is None):
        absent = "pos_scores" if positive_scores is None else "neg_scores"
        raise TrainingDataError(f"{location}: {absent!r} is missing; a teacher scores all passages of a row or none")
    if positive_scores is None:
        negative_scores = None
    elif negative_scores is None:
        negative_scores = ()
    for key in ("prompt", "type"):
        if row.get(key) is not None and not isinstance(row[key], str):
            raise TrainingDataError(f"{location}: {key!r} must be a string, got {_kind(row[key])}")
    prompt, task_type = row.get("prompt"), row.get("type")
    scores = (positive_scores, negative_scores)
    return TrainingRow(query, positives, negatives, *scores, prompt, task_type, index, location)


def parse_object(line: TrainingLine, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of one line, its values not yet checked.

    Raises:
        TrainingDataError: it is no JSON, no UTF-8, or no object.
    """
    location = f"{path}:{line.number}"
    try:
        row = json.loads(line.content.decode("utf-8-sig" if line.begin == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise TrainingDataError(f"{location}: not UTF-8: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise TrainingDataError(f"{location}: not JSON: {error}") from error
    if not isinstance(row, dict):
        hint = "; one row a line is expected, not one array of all rows" if isinstance(row, list) else ""
        raise TrainingDataError(f"{location}: expected a JSON object, got {_kind(row)}{hint}")
    return row


def largest_group(row: TrainingRow) -> int | None:
    """Largest group of passages that the row's type allows (see FlagEmbedding), or None."""
    if row.type == "only_1neg":
        return 2
    return 1 + len(row.negatives) if row.type == "symmetric_class" else None


def open_training_file(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ImportError: a .zst file, and no package that reads it.
    """
    _check_file(path)
    opener = _opener(path)
    return opener(path) if opener else path.open("rb")


def training_lines(file: IO[bytes], path: str | os.PathLike[str]) -> Iterator[TrainingLine]:
    """The lines of an open file that are not blank.

    Raises:
        TrainingDataError: the file is damaged.
    """
    number = begin = 0
    try:
        for number, content in enumerate(file, 1):
            if not content.isspace():
                yield TrainingLine(number, begin, content)
            begin += len(content)
    except _UNPACKING as error:
        if _is_failure(error):
            raise
        raise TrainingDataError(f"{path}: damaged after line {number}: {error}") from error


def _text(row: dict[str, Any], key: str, location: str) -> str:
    if key not in row:
        _missing(row, key, location)
    text = row[key]
    if not isinstance(text, str):
        raise TrainingDataError(f"{location}: {key!r} must be a string, got {_kind(text)}")
    if not text.strip():
        raise TrainingDataError(f"{location}: {key!r} is empty")
    return text


def _texts(row: dict[str, Any], key: str, location: str) -> tuple[str, ...]:
    if key not in row:
        _missing(row, key, location)
    texts = row[key]
    if not isinstance(texts, list):
        raise TrainingDataError(f"{location}: {key!r} must be a list of strings, got {_kind(texts)}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TrainingDataError(f"{location}: {key!r}[{number}] must be a string, got {_kind(text)}")
        if not text.strip():
            raise TrainingDataError(f"{location}: {key!r}[{number}] is empty")
    return tuple(texts)


def _scores(row: dict[str, Any], key: str, count: int, location: str) -> tuple[float, ...] | None:
    scores = row.get(key)
    if scores is None:
        return None
    if not isinstance(scores, list):
        raise TrainingDataError(f"{location}: {key!r} must be a list of numbers, got {_kind(scores)}")
    if len(scores) != count:
        passages = f"{key.removesuffix('_scores')!r} has {count}"
        raise TrainingDataError(f"{location}: {key!r} has {len(scores)} numbers, but {passages} passages")
    for number, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise TrainingDataError(f"{location}: {key!r}[{number}] must be a finite number, got {_kind(score)}")
    return tuple(float(score) for score in scores)


def _missing(row: dict[str, Any], key: str, location: str) -> NoReturn:
    raise TrainingDataError(f"{location}: no {key!r}; the row has {', '.join(map(repr, row)) or 'no keys'}")


def _empty(path: Path) -> TrainingDataError:
    return TrainingDataError(f"{path}: the file has no rows")


def _kind(value: Any) -> str:
    """What a JSON value is, short enough for a message."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), repr(value))


def _digests(row: TrainingRow) -> Iterator[int]:
    """64 bits of the query and of each positive, the same on every rank; a query never equals a passage."""
    for kind, text in ((b"query", row.query), *((b"pos", text) for text in row.positives)):
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=kind).digest()
        yield int.from_bytes(digest, "little")


def _connected(digests: NDArray[np.uint64], rows: NDArray[np.int32], count: int) -> Lengths:
    """For each row the number of its component in the graph of rows and digests."""
    texts = np.unique(digests, return_inverse=True)[1]
    size = count + int(texts.max()) + 1
    edges = coo_array((np.ones(len(rows), dtype=np.int8), (rows, count + texts)), shape=(size, size))
    numbers: Lengths = connected_components(edges, directed=False)[1][:count].astype(np.int32)
    return numbers


class _PlainFile:
    """A file that can be read at any place, also by several processes at once.

    Attributes:
        path: of the file as it is, or unpacked; shown: of the file as given, for messages.
    """

    def __init__(self, shown: Path) -> None:
        _check_file(shown)
        self.shown = shown
        self.path = _unpacked(shown) if _opener(shown) else shown
        self._state = _state(self.path)
        self._opened: tuple[int, int] | None = None

    def read(self, begin: int, size: int) -> bytes:
        """`size` bytes from `begin`, by pread: no position in the file that forked workers would share."""
        content = os.pread(self._descriptor(), size, begin)
        if len(content) < size:
            raise TrainingDataError(f"{self.path} was cut short while in use")
        return content

    def _descriptor(self) -> int:
        if self._opened is None or self._opened[0] != os.getpid():
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            if _state(self.path) != self._state:
                os.close(descriptor)
                raise TrainingDataError(f"{self.path} was changed since the dataset was made; make the dataset again")
            self._opened = (os.getpid(), descriptor)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __del__(self) -> None:
        opened = getattr(self, "_opened", None)
        if opened is not None and opened[0] == os.getpid():
            os.close(opened[1])


def _state(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the training files in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no training file {path}")


def _opener(path: Path) -> Callable[[Path], IO[bytes]] | None:
    """What opens a packed file of this ending; None for a file as it is."""
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.GzipFile,
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
        ".zst": _open_zstandard,
    }
    return openers.get(path.suffix.lower())


def _open_zstandard(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            f"{path} needs the package zstandard; pip install 'm3kernels[zstd]', or unpack the file"
        ) from error
    return io.BufferedReader(_ZstandardStream(path, zstandard))


class _ZstandardStream(io.RawIOBase):
    """Unpacked bytes of zstandard frames; zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._packed = path.open("rb")
        self._zstandard = zstandard
        self._blocks = self._unpack()
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
        count = min(len(target), len(self._block))
        target[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()

    def _unpack(self) -> Iterator[bytes]:
        frame: Any = None
        while packed := self._packed.read(1 << 17):
            while packed:
                frame = frame or self._zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(packed)
                except self._zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                packed = frame.unused_data
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the file ends within a frame")


def _is_failure(error: Exception) -> bool:
    """Whether the system failed (disk full, no permission); gzip and bz2 raise OSError without number on bad bytes."""
    return isinstance(error, OSError) and error.errno is not None


def _unpacked(path: Path) -> Path:
    """The unpacked copy of a file; made once for each state of it, whole or not at all."""
    folder = Path(tempfile.gettempdir()) / f"m3-training-data-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
        raise PermissionError(f"{folder} belongs to someone else; set TMPDIR to a folder of your own")
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:24]
    plain = folder / f"{key}.jsonl"
    if plain.exists():
        return plain
    descriptor, fresh = tempfile.mkstemp(dir=folder, prefix=".unpacking-")
    try:
        with os.fdopen(descriptor, "wb") as target, open_training_file(path) as packed:
            shutil.copyfileobj(packed, target, 1 << 20)
        # Of processes that unpack at once the last one's copy stays; by size and time (_state) all are the same.
        os.utime(fresh, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        os.replace(fresh, plain)
    except _UNPACKING as error:
        if isinstance(error, OSError) and _is_failure(error):
            raise OSError(error.errno, f"cannot unpack {path} into {folder}: {error.strerror}") from error
        raise TrainingDataError(f"{path}: damaged: {error}") from error
    finally:
        Path(fresh).unlink(missing_ok=True)
    return plain
