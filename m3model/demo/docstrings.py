"""The demo's texts: docstrings of torch, numpy and scipy as pairs of a summary and the body that it summarises.

    documents    what the modules in MODULES export and the methods of their classes, by name, each object once
    summary      first sentence, behind the signature that some docstrings start with
    body         everything after it, at least 200 characters
    no leak      a body that repeats its summary is left out; so is a summary or a body that occurred before

They fall into three sets without a common pair, and no body that is trained on is like one of the others (`_unlike`):

    held out     torch and numpy: what the demo searches and measures. All cannot be encoded in minutes: the LONGEST
                 longest bodies are taken and those that the demo's questions ask for, then others of at most USUAL
                 tokens, from the end of the order of a hash of their names, until the tokens are used up
    development  torch and numpy: DEVELOPMENT others from the beginning of that order, and those that are not trained on
                 because their bodies are like others. Choices are made on them (benchmarks/report_demo.py); the demo
                 itself leaves them alone
    training     what is left, scipy included

_DRAW counts the draws of the sets: a recipe is measured on held-out pairs that were not looked at with it. Another
draw gives no fresh ones: nearly all pairs of at most USUAL tokens are held out or development pairs now. With torch
2.13.0, numpy 2.4.6 and scipy 1.17.1 draw 3 would hold out 746: 429 that draw 2 holds out, 310 of its development
pairs, on which the recipe of today was chosen, and 6 of its training pairs.
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
    "DEVELOPMENT",
    "LONGEST",
    "MODULES",
    "USUAL",
    "Pair",
    "apart",
    "choose",
    "collect",
    "is_searched",
    "split_docstring",
]

LONGEST = 2
USUAL = 512
DEVELOPMENT = 450
_DEVELOPMENT_CHARACTERS = 1700
"""Of the longest body among them, about USUAL tokens."""
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
_NO_SUMMARY = re.compile(r"(see |alias|in-?place version|deprecated|\.\. |note|warning|:)", re.IGNORECASE)
_SIGNATURE = re.compile(r"[\w.*]+\(.*\)?( *-> *.*)?$", re.DOTALL)
_SENTENCE = re.compile(r"(.*?[.!?])(?:\s+|$)(.*)", re.DOTALL)


class Pair(NamedTuple):
    """An object's name, the first sentence of its docstring and the rest."""

    name: str
    summary: str
    body: str


def collect() -> list[Pair]:
    """All pairs of this installation, by the rule above."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    for name, docstring in _docstrings():
        split = split_docstring(docstring)
        if split is None:
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


def apart(pairs: Sequence[Pair], held_out: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The development and the training pairs among `pairs`, in order, when `held_out` are searched."""
    held = {pair.name for pair in held_out}
    others = _unlike([pair for pair in pairs if pair.name not in held], held_out)
    short = [n for n, pair in enumerate(others) if _is_short(pair)]
    chosen = set(_shuffled(short, others)[: min(DEVELOPMENT, len(others) // 3)])
    training = _unlike([p for n, p in enumerate(others) if n not in chosen], [others[number] for number in chosen])
    trained_on = {pair.name for pair in training}
    development = [p for p in pairs if p.name not in held and p.name not in trained_on and _is_short(p)]
    return development, training


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
    return is_searched(pair) and len(pair.body) <= _DEVELOPMENT_CHARACTERS


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
