"""What every GPU kernel compiles to in every configuration that ships, without a GPU: `m3 bench --static`.

Configurations are the entries of the tile tables, for each architecture that they serve, each dtype, and each set of
options that a call can turn on (the ops' OPTION_SETS). Compiled facts are cached under a hash of source,
configuration and Triton's version in $M3_CACHE_DIR (default ~/.cache/m3kernels); the CUDA C++ kernels are read out of
the compiled library.

The facts that ship are recorded in benchmarks/results/gpu_static.json, each entry with its hash, so that a stale one is
recognised.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from m3kernels import _library, _tiles, compiled_facts, machine_code
from m3kernels.compiled_facts import CompiledFacts, compile_kernel, configuration_hash, library_facts, triton_facts

OPS = ("attention", "maxsim")
ARCHITECTURES = (80, 86, 89, 90, 100)
ARITHMETICS = {"16bit": ("bf16", "fp16"), "float32": ("fp32",), "tf32": ("tf32",)}
"""Columns of a tile table → dtypes that it serves; tf32 is float32 with allow_tf32."""
LOOP_FLOPS = {
    "attention": {"forward": 4, "backward_q": 6, "backward_kv": 8},
    "maxsim": {"forward": 2, "pairs_forward": 2, "backward_p": 2},
}
"""Useful FLOPs of one turn of a kernel's main loop, over its product of block sizes: 2 for each product."""


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration; dtype "tf32" is float32 with allow_tf32, options the switches that are on."""

    op: str
    architecture: int
    kernel: str
    dtype: str
    width: int
    options: tuple[str, ...]
    tile: tuple[int, ...]

    @property
    def name(self) -> str:
        """As in the record: attention/sm_80/forward/bf16/64/plain, or at the end sampled+dropout."""
        variant = _tiles.options_text(self.options) or "plain"
        return f"{self.op}/sm_{self.architecture}/{self.kernel}/{self.dtype}/{self.width}/{variant}"

    @property
    def block_flops(self) -> int:
        """Useful FLOPs of one turn of the main loop in one block; 0 for kernels without products."""
        tile = _tiles.Tile.from_list(list(self.tile))
        products = LOOP_FLOPS[self.op].get(self.kernel, 0)
        return products * tile.block_m * tile.block_n * (tile.block_k or self.width)

    @property
    def configuration(self) -> dict[str, Any]:
        """Everything beside its source that the kernel is compiled from."""
        signature, constants, aligned = _arguments(self)
        tile = _tiles.Tile.from_list(list(self.tile))
        blocks = _module(self.op).SUM_BLOCKS if self.kernel == "sum" else tile.blocks()
        constants = {**constants, **blocks, "PRECISION": "tf32" if self.dtype == "tf32" else "ieee"}
        return {
            "signature": signature,
            "constants": {name: value for name, value in constants.items() if name in signature},
            "architecture": self.architecture,
            "aligned": aligned,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    @property
    def hash(self) -> str:
        """Of source, configuration and Triton's version."""
        return configuration_hash(_kernel(self), self.configuration)


def entries(ops: Iterable[str] = OPS, architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Entry]:
    """All configurations of the ops, in the order of the tables.

    Raises:
        ValueError: an op without tile tables.
    """
    architectures = tuple(architectures)
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op is {op!r}; accepted: {', '.join(map(repr, OPS))}")
        for architecture in architectures:
            for kernel, column, width, options, tile in _lines(op, architecture):
                for dtype in ARITHMETICS[column]:
                    yield Entry(op, architecture, kernel, dtype, width, options, tile)


def compile_entry(entry: Entry) -> Any:
    """The kernel of an entry, compiled by Triton."""
    return compile_kernel(_kernel(entry), **entry.configuration)


def facts_of(entry: Entry) -> CompiledFacts:
    """Compile the kernel of an entry and read the machine code."""
    return triton_facts(compile_entry(entry))


def compile_entries(
    chosen: Iterable[Entry], cache: Path | None = None, advance: Callable[[int], object] = lambda _: None
) -> dict[Entry, CompiledFacts]:
    """Facts by the entries, out of the cache or compiled by as many processes as there are cores.

    Args:
        cache: folder; None keeps nothing, but Triton's own cache is used (see `triton_cache`).
        advance: told how many more entries are done.
    """
    chosen = list(chosen)
    found: dict[Entry, CompiledFacts] = {}
    for entry in chosen:
        facts = _read(_cached(cache, entry)) if cache else None
        if facts:
            found[entry] = facts
    advance(len(found))
    missing = [entry for entry in chosen if entry not in found]
    if missing:
        workers = min(len(missing), len(os.sched_getaffinity(0)))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(facts_of, entry): entry for entry in missing}
            for done in as_completed(running):
                entry = running[done]
                found[entry] = done.result()
                if cache:
                    _write(_cached(cache, entry), json.dumps(asdict(found[entry])))
                advance(1)
    return {entry: found[entry] for entry in chosen}


@contextmanager
def triton_cache(folder: Path | None) -> Iterator[None]:
    """What is compiled within, by this process or those it starts, Triton keeps in `folder`; None: only meanwhile."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TRITON_CACHE_DIR"] = str(folder or temporary)
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


def cache_folder() -> Path:
    """Where compiled facts are kept: $M3_CACHE_DIR, else m3kernels in the user's cache folder."""
    chosen = os.environ.get("M3_CACHE_DIR")
    if chosen:
        return Path(chosen) / "static"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3kernels" / "static"


def library_entries(architectures: Iterable[int] = ARCHITECTURES) -> dict[str, CompiledFacts]:
    """Facts of the CUDA C++ kernels, named as cuda/sm_80/pack_kernel<Bytes16>; none where the library was not built.

    A card executes the machine code of the newest architecture of its own generation that is not newer than itself.
    """
    if _library.CUDA_LIBRARY is None:
        return {}
    held = machine_code.library_functions(_library.CUDA_LIBRARY)
    executed = {
        asked: max((one for one in held if one // 10 == asked // 10 and one <= asked), default=None)
        for asked in architectures
    }
    facts = library_facts(held, {asked: own for asked, own in executed.items() if own is not None})
    return {
        f"cuda/sm_{architecture}/{name}": value
        for architecture, named in facts.items()
        for name, value in named.items()
    }


def problems(facts: CompiledFacts, dtype: str) -> list[str]:
    """What a kernel that ships must not do: spill, exceed shared memory, multiply off the tensor cores, wait for every
    single wgmma product.

    float32 without allow_tf32 multiplies in IEEE float32, which no tensor core does: dtype "fp32" is excepted.
    """
    found = []
    if facts.spilled:
        found.append(f"spills: {facts.stack_bytes} bytes of stack, {facts.local_accesses} local accesses")
    if not facts.fits or facts.blocks_per_multiprocessor == 0:
        found.append(f"does not fit: {facts.registers} registers, {facts.shared_bytes} bytes of shared memory")
    if dtype != "fp32" and facts.products and (facts.fma_products or not facts.tensor_instructions):
        found.append("a product runs off the tensor cores")
    if facts.serialized_products:
        found.append(f"wgmma products wait for each other: {facts.serialized_products} groups more than in the source")
    return found


def read_record(path: Path) -> dict[str, Any]:
    """The record as written, facts as CompiledFacts: triton, entries {name: (hash, facts)}, library {name: facts}."""
    record = json.loads(path.read_text())
    return {
        "triton": record["triton"],
        "entries": {name: (one["hash"], _facts(one["facts"])) for name, one in record["entries"].items()},
        "library": {name: _facts(facts) for name, facts in record["library"].items()},
    }


def record_text(facts: Mapping[Entry, CompiledFacts], library: Mapping[str, CompiledFacts]) -> str:
    """The record as JSON, one line for each entry; counts of 0 are left out."""
    import triton

    lines = [
        f"    {json.dumps(entry.name)}: " + json.dumps({"hash": entry.hash, "facts": _short(value)})
        for entry, value in facts.items()
    ]
    held = [f"    {json.dumps(name)}: {json.dumps(_short(value))}" for name, value in library.items()]
    joined = [",\n".join(part) for part in (lines, held)]
    return (
        f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "entries": {{\n{joined[0]}\n  }},\n'
        f'  "library": {{\n{joined[1]}\n  }}\n}}\n'
    )


def _lines(op: str, architecture: int) -> Iterator[tuple[str, str, int, tuple[str, ...], tuple[int, ...]]]:
    """Kernel, column, width, options and tile of all that an architecture runs, kernels without a table included."""
    option_sets = _module(op).OPTION_SETS
    for kernel, columns in _tiles.for_architecture(op, architecture).entries.items():
        for column, tiles in columns.items():
            for width in _tiles.widths(tiles):
                for options in option_sets[kernel]:
                    yield kernel, column, width, options, tuple(_tiles.tile_of(tiles, width, options))
    if op == "maxsim":
        blocks = _module(op).SUM_BLOCKS
        for options in option_sets["sum"]:
            yield "sum", "float32", 0, options, (blocks["BLOCK_R"], blocks["BLOCK_P"], 4, 3)


def _module(op: str) -> Any:
    return importlib.import_module(f"m3kernels.{op}.triton_kernels")


def _kernel(entry: Entry) -> Any:
    return getattr(_module(entry.op), f"{entry.kernel}_kernel")


def _arguments(entry: Entry) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    dtype = "fp32" if entry.dtype == "tf32" else entry.dtype
    arguments: tuple[dict[str, str], dict[str, Any], tuple[str, ...]] = _module(entry.op).compiled_arguments(
        _kernel(entry), dtype, entry.width, entry.options
    )
    return arguments


@functools.cache
def _reader_hash() -> str:
    """Hash of the modules that read the machine code, without comments and layout."""
    sources: Sequence[Any] = (compiled_facts, machine_code)
    trees = (ast.unparse(ast.parse(Path(str(module.__file__)).read_text())) for module in sources)
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:16]


def _cached(folder: Path, entry: Entry) -> Path:
    return folder / f"{entry.hash}-{_reader_hash()}.json"


def _read(path: Path) -> CompiledFacts | None:
    try:
        return _facts(json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def _write(path: Path, text: str) -> None:
    """Whole or not at all: other processes may read meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _facts(stored: dict[str, Any]) -> CompiledFacts:
    none = dict.fromkeys(machine_code.INSTRUCTIONS, 0)
    counts = {key: {**none, **stored[key]} for key in ("counts", "loop_counts")}
    return CompiledFacts(**{**stored, **counts})


def _short(facts: CompiledFacts) -> dict[str, Any]:
    return {
        key: {kind: count for kind, count in value.items() if count} if isinstance(value, dict) else value
        for key, value in asdict(facts).items()
    }
