"""The demo's collection: docstrings of torch and numpy as pairs of a summary and the body that it summarises.

    documents    what the modules in MODULES export and the methods of their classes, by name, each object once
    summary      first sentence, behind the signature that some docstrings start with
    body         everything after it, at least 200 characters
    no leak      a body that repeats its summary is left out; so is a summary or a body that occurred before

All of it cannot be encoded in minutes. The LONGEST longest bodies are always taken, and those that the demo's questions
ask for; the others, of at most USUAL tokens, follow in the order of a hash of their names until the tokens are used up.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["LONGEST", "MODULES", "USUAL", "Pair", "choose", "collect", "shuffled", "split_docstring"]

LONGEST = 2
USUAL = 1000
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
)
_NO_SUMMARY = re.compile(r"(see |alias|in-?place version|deprecated|\.\. |note|warning|:)", re.IGNORECASE)
_SIGNATURE = re.compile(r"[\w.*]+\(.*\)?( *-> *.*)?$", re.DOTALL)
_SENTENCE = re.compile(r"(.*?[.!?])(?:\s+|$)(.*)", re.DOTALL)


class Pair(NamedTuple):
    """An object's name, the first sentence of its docstring and the rest."""

    name: str
    summary: str
    body: str


def collect() -> list[Pair]:
    """All pairs of this installation's torch and numpy, by the rule above."""
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
    """The longest pairs, those named in `always`, and others by their hash while `budget` tokens last; in order."""
    numbers = range(len(pairs))
    by_length = sorted(numbers, key=lambda number: (-lengths[number], pairs[number].name))
    by_hash = [number for number in shuffled(numbers, pairs) if lengths[number] <= USUAL]
    chosen = {*by_length[:LONGEST], *(number for number in numbers if pairs[number].name in always)}
    used = sum(lengths[number] for number in chosen)
    for number in by_hash:
        if number not in chosen and used + lengths[number] <= budget:
            chosen.add(number)
            used += lengths[number]
    return [pairs[number] for number in sorted(chosen)]


def shuffled(numbers: Iterable[int], pairs: Sequence[Pair]) -> list[int]:
    """Numbers of pairs in the order of a hash of the pairs' names."""
    return sorted(numbers, key=lambda number: hashlib.sha256(pairs[number].name.encode()).digest())


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
    ours = isinstance(home, str) and home.split(".")[0] in ("torch", "numpy", "builtins")
    return ours and callable(member) and isinstance(member.__doc__, str)


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
