"""The demo's texts: docstrings of torch, numpy and scipy as pairs of a summary and the body that it summarises.

    documents    what the modules in MODULES export and the methods of their classes, by name, each object once
    summary      first sentence, behind the signature that some docstrings start with
    body         everything after it, at least 200 characters
    steady       what has another docstring in every process is left out
    no leak      a body that repeats its summary is left out; so is a summary or a body that occurred before

They fall into two sets:

    held out     torch and numpy: what the demo searches and measures. All cannot be encoded in minutes: the LONGEST
                 longest bodies are taken and those that the demo's questions ask for, then others of at most USUAL
                 tokens, from the end of the order of a hash of their names, until the tokens are used up
    training     the others, scipy included, whose bodies are like none that is held out (`_unlike`)

Choices are made without the held-out pairs, in two folds (benchmarks/report_demo.py): short pairs of torch and numpy
that are not held out fall into two halves; each half is searched by a model that was trained on training pairs whose
bodies are like none of that half.

_DRAW counts the draws of the sets. Another draw gives no fresh held-out pairs: nearly all of at most USUAL tokens are
held out or in a fold now.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = [
    "LONGEST",
    "MODULES",
    "USUAL",
    "Fold",
    "Pair",
    "apart",
    "choose",
    "collect",
    "folds",
    "is_searched",
    "split_docstring",
]

LONGEST = 2
USUAL = 512
_DEVELOPMENT_CHARACTERS = 1700
"""Of the longest development body, about USUAL tokens."""
_DRAW = 2
_ALIKE = 0.5
_RUN = 8
MODULES = (
    *("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.polynomial", "numpy.polynomial.polynomial"),
    *("numpy.lib.stride_tricks", "numpy.lib.format", "numpy.ma", "numpy.strings", "numpy.testing", "numpy.rec"),
    *("torch", "torch.linalg", "torch.fft", "torch.special", "torch.nn", "torch.nn.functional", "torch.nn.init"),
    *("torch.nn.utils", "torch.nn.utils.rnn", "torch.nn.utils.prune", "torch.nn.parallel", "torch.nn.attention"),
    *("torch.optim", "torch.optim.lr_scheduler", "torch.optim.swa_utils", "torch.distributions", "torch.utils.data"),
    *("torch.utils.checkpoint", "torch.utils.tensorboard", "torch.autograd", "torch.autograd.functional"),
    *("torch.autograd.graph", "torch.func", "torch.amp", "torch.cuda", "torch.sparse", "torch.signal.windows"),
    *("torch.distributed", "torch.distributed.fsdp", "torch.profiler", "torch.jit", "torch.fx", "torch.export"),
    *("torch.compiler", "torch.library", "torch.hub", "torch.multiprocessing", "torch.random", "torch.testing"),
    *("torch.nested", "torch.masked", "torch.overrides", "torch.backends.cuda"),
    *("scipy.cluster.hierarchy", "scipy.cluster.vq", "scipy.datasets", "scipy.differentiate", "scipy.fft"),
    *("scipy.fftpack", "scipy.integrate", "scipy.interpolate", "scipy.io", "scipy.linalg", "scipy.ndimage"),
    *("scipy.optimize", "scipy.signal", "scipy.signal.windows", "scipy.sparse", "scipy.sparse.linalg"),
    *("scipy.sparse.csgraph", "scipy.spatial", "scipy.spatial.distance", "scipy.spatial.transform", "scipy.special"),
    *("scipy.stats", "scipy.stats.contingency", "scipy.stats.mstats", "scipy.stats.qmc"),
)
_SEARCHED = ("torch", "numpy")
_VARYING = ("scipy.signal.lombscargle", "scipy.stats.Normal")
"""scipy 1.17 makes another docstring of these in every process, out of a set's order and out of random numbers."""
_NO_SUMMARY = re.compile(r"(see |alias|in-?place version|deprecated|\.\. |note|warning|:)", re.IGNORECASE)
_SIGNATURE = re.compile(r"[\w.*]+\(.*\)?( *-> *.*)?$", re.DOTALL)
_SENTENCE = re.compile(r"(.*?[.!?])(?:\s+|$)(.*)", re.DOTALL)


class Pair(NamedTuple):
    """An object's name, the first sentence of its docstring and the rest."""

    name: str
    summary: str
    body: str


class Fold(NamedTuple):
    """Pairs to search, and pairs to train on for that."""

    development: list[Pair]
    training: list[Pair]


def collect() -> list[Pair]:
    """All pairs of this installation, by the rule above."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    for name, docstring in _docstrings():
        split = split_docstring(docstring)
        if split is None or name in _VARYING:
            continue
        keys = {_normalised(text) for text in split}
        if not keys & seen:
            pairs.append(Pair(name, *split))
        seen |= keys
    return pairs


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Summary and body, or None for a docstring without a pair of them."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    while paragraphs and _SIGNATURE.fullmatch(paragraphs[0].strip()):
        paragraphs.pop(0)
    if not paragraphs:
        return None
    sentence = _SENTENCE.match(" ".join(paragraphs[0].split()))
    if sentence is None:
        return None
    summary, rest = sentence.groups()
    body = "\n\n".join([rest, *paragraphs[1:]]).strip()
    leaks = _normalised(summary) in _normalised(body)
    if _NO_SUMMARY.match(summary) or not 4 <= len(summary.split()) <= 40 or len(body) < 200 or leaks:
        return None
    return summary, body


def choose(pairs: Sequence[Pair], lengths: Sequence[int], budget: int, always: Collection[str] = ()) -> list[Pair]:
    """The held-out pairs in order: the longest, those named in `always`, and others while `budget` tokens last."""
    numbers = [number for number, pair in enumerate(pairs) if is_searched(pair)]
    by_length = sorted(numbers, key=lambda number: (-lengths[number], pairs[number].name))
    chosen = {*by_length[:LONGEST], *(number for number in numbers if pairs[number].name in always)}
    used = sum(lengths[number] for number in chosen)
    for number in reversed(_shuffled(numbers, pairs)):
        if number not in chosen and lengths[number] <= USUAL and used + lengths[number] <= budget:
            chosen.add(number)
            used += lengths[number]
    return [pairs[number] for number in sorted(chosen)]


def apart(pairs: Sequence[Pair], held_out: Sequence[Pair]) -> list[Pair]:
    """The training pairs among `pairs`, in order, when `held_out` are searched."""
    held = {pair.name for pair in held_out}
    return _unlike([pair for pair in pairs if pair.name not in held], held_out)


def folds(pairs: Sequence[Pair], held_out: Sequence[Pair]) -> tuple[Fold, Fold]:
    """The two folds of `pairs` without `held_out`."""
    held = {pair.name for pair in held_out}
    short = [n for n, p in enumerate(pairs) if p.name not in held and is_searched(p) and _is_short(p)]
    shuffled, training = _shuffled(short, pairs), apart(pairs, held_out)
    first, second = ([pairs[number] for number in sorted(shuffled[half::2])] for half in (0, 1))
    return Fold(first, apart(training, first)), Fold(second, apart(training, second))


def _unlike(pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    """Those of `pairs` whose body is like none of `others`: they share at most half of the shorter one's runs of words.

    The bodies of numpy.arccos and torch.arccos, or of one optimizer and the next, would let a set know another one.
    """
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes = []
    for number, pair in enumerate(others):
        runs = _runs(pair.body)
        sizes.append(len(runs))
        for run in runs:
            holders.setdefault(run, []).append(number)
    kept = []
    for pair in pairs:
        runs = _runs(pair.body)
        shared = Counter(number for run in runs for number in holders.get(run, ()))
        if all(count <= _ALIKE * min(len(runs), sizes[number]) for number, count in shared.items()):
            kept.append(pair)
    return kept


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of _RUN words."""
    words = _normalised(text).split()
    return {tuple(words[begin : begin + _RUN]) for begin in range(len(words) - _RUN + 1)}


def _is_short(pair: Pair) -> bool:
    return len(pair.body) <= _DEVELOPMENT_CHARACTERS


def is_searched(pair: Pair) -> bool:
    """Whether the demo may search it."""
    return pair.name.split(".")[0] in _SEARCHED


def _shuffled(numbers: Iterable[int], pairs: Sequence[Pair]) -> list[int]:
    """Numbers of pairs in the order of a hash of _DRAW and the pairs' names."""
    return sorted(numbers, key=lambda number: hashlib.sha256(f"{_DRAW} {pairs[number].name}".encode()).digest())


def _docstrings() -> Iterator[tuple[str, str]]:
    seen: dict[int, object] = {}  # holds the objects, lest another one get the id of one that is gone
    for module_name in MODULES:
        with warnings.catch_warnings(), contextlib.suppress(ImportError):
            warnings.simplefilter("ignore")
            module = importlib.import_module(module_name)
            # numpy makes its __all__ out of sets, whose order is another one in every process.
            for name in sorted(getattr(module, "__all__", None) or vars(module)):
                member = getattr(module, name, None)
                if name.startswith("_") or not _is_documented(member) or id(member) in seen:
                    continue
                seen[id(member)] = member
                yield f"{module_name}.{name}", str(member.__doc__)
                if not isinstance(member, type):
                    continue
                for method_name, method in sorted(vars(member).items()):
                    inner = getattr(method, "__func__", method)
                    if not method_name.startswith("_") and _is_documented(inner) and id(inner) not in seen:
                        seen[id(inner)] = inner
                        yield f"{module_name}.{name}.{method_name}", str(inner.__doc__)


def _is_documented(member: object) -> bool:
    home = getattr(member, "__module__", None) or "builtins"
    ours = isinstance(home, str) and home.split(".")[0] in ("torch", "numpy", "scipy", "builtins")
    return ours and callable(member) and isinstance(member.__doc__, str)


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
