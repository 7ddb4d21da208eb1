"""m3 bench: what the GPU kernels compile to (no GPU needed), and the fastest tile shapes (on a GPU)."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3model.cli.options import AsJson

if TYPE_CHECKING:
    import torch

    from m3kernels.compiled_facts import CompiledFacts
    from m3kernels.compiled_tables import Entry


class Op(str, Enum):
    """Ops with tile tables."""

    attention = "attention"
    maxsim = "maxsim"


def bench(
    static: Annotated[
        bool, typer.Option("--static", help="Compile every GPU kernel in every shipped configuration; needs no GPU.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Time tile shapes on a GPU and write the fastest into the tile table.")
    ] = False,
    op: Annotated[list[Op] | None, typer.Option(help="Only this op; may be repeated. [default: all]")] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="With --static: only this architecture, such as 80. [default: all]")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="With --static: write the report to this file.")] = None,
    cache: Annotated[bool, typer.Option(help="With --static: keep and use compiled facts, and Triton's cache.")] = True,
    device: Annotated[str, typer.Option(help="With --tune: which GPU.")] = "cuda",
    out: Annotated[
        Path | None, typer.Option(help="With --tune: folder for <op>.json instead of the installed tables.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Facts of the compiled GPU kernels (--static), or the fastest tiles of this GPU (--tune).

    --static compiles for sm_80, 86, 89, 90 and 100: registers, spills, shared memory, occupancy, and the instructions
    of the main loop. The status is 1 if a kernel spills, does not fit, or multiplies off the tensor cores (float32
    without allow_tf32 excepted). The first run takes minutes, later ones come out of the cache ($M3_CACHE_DIR).
    """
    if static == tune:
        raise typer.BadParameter("give one of --static and --tune", param_hint="--static / --tune")
    ops = [one.value for one in op] if op else [one.value for one in Op]
    if tune:
        _tune(ops, device, out, as_json=as_json)
    else:
        _static(ops, arch, markdown, cache=cache, as_json=as_json)


def _static(ops: list[str], arch: list[int] | None, markdown: Path | None, *, cache: bool, as_json: bool) -> None:
    from m3model.cli.output import document_bar, message

    tables = _needs_triton("m3kernels.compiled_tables")
    report = _needs_triton("m3kernels.static_report")
    architectures = arch or list(tables.ARCHITECTURES)
    unknown = [number for number in architectures if number not in tables.ARCHITECTURES]
    if unknown:
        accepted = ", ".join(map(str, tables.ARCHITECTURES))
        raise typer.BadParameter(f"{unknown[0]}; accepted: {accepted}", param_hint="--arch")
    entries = list(tables.entries(ops, architectures))
    kept_by_triton = nullcontext() if cache else tables.triton_cache(None)
    with kept_by_triton, document_bar("Compiling", len(entries), "kernels") as advance:
        facts = tables.compile_entries(entries, tables.cache_folder() if cache else None, advance)
    library = tables.library_entries(architectures)
    if not library:
        message("The CUDA C++ kernels are not in the table: this installation was built without nvcc.")
    if markdown:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(report.markdown(facts, library))
    if as_json:
        sys.stdout.write(tables.record_text(facts, library))
    else:
        _print_tables(facts, library)
    bad = {entry.name: tables.problems(value, entry.dtype) for entry, value in facts.items()}
    bad |= {name: tables.problems(value, "fp32") for name, value in library.items()}
    for name, reasons in bad.items():
        for reason in reasons:
            message(f"{name}: {reason}")
    if any(bad.values()):
        raise typer.Exit(1)
    message(
        f"{len(entries)} configurations and {len(library)} CUDA C++ kernels: no spills, no product off tensor cores."
    )


def _print_tables(facts: dict[Entry, CompiledFacts], library: dict[str, CompiledFacts]) -> None:
    from m3kernels.static_report import COLUMNS, RATIOS, SHORT, ratios, tile_text
    from m3model.cli.output import print_table

    def cells(value: CompiledFacts) -> list[str]:
        return [COLUMNS[name](value) for name in SHORT]

    right = " ".join(("kernel", *SHORT))
    rows = [
        [entry.name, tile_text(entry.tile), *cells(value), ratios(entry, value)[0]] for entry, value in facts.items()
    ]
    print_table(["kernel", "tile", *SHORT, RATIOS[0]], rows, right=right)
    if library:
        rows = [[name, *cells(value)] for name, value in library.items()]
        print_table(["kernel", *SHORT], rows, right=right)


def _tune(ops: list[str], device: str, out: Path | None, *, as_json: bool) -> None:
    import torch

    from m3model.cli.output import message, print_json

    if not torch.cuda.is_available():
        raise typer.BadParameter("tiles are timed on an NVIDIA GPU, and torch sees none here", param_hint="--tune")
    place = torch.device(device)
    if place.type != "cuda":
        raise typer.BadParameter(f"{device!r} is no GPU: cuda, cuda:1 ...", param_hint="--device")
    written = {}
    for op in ops:
        path, entries = _tune_op(op, place, out, report=message)
        written[op] = {"path": str(path), "entries": entries}
        message(f"{op}: wrote {path}")
    if as_json:
        print_json(written)


def _tune_op(op: str, device: torch.device, out: Path | None, *, report: Any) -> tuple[Path, Any]:
    """Tune one op and write its table, beside the tables of the other architectures."""
    import torch

    from m3kernels import _tiles, gpu_support

    tuning = _needs_triton("m3kernels.tuning")
    major, minor = torch.cuda.get_device_capability(device)
    path = _tiles.path(op)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        installed, path = path, out / f"{op}.json"
        if not path.exists():
            path.write_text(installed.read_text())
    entries = tuning.tune(op, device, gpu_support.triton_kernels(op, device)[1], report=report)
    tuning.write_table(op, 10 * major + minor, entries, path)
    return path, entries


def _needs_triton(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "triton":
            raise RuntimeError("Triton is not installed: pip install triton (Linux)") from error
        raise
