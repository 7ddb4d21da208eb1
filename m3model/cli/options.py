"""Options that several commands share, and loading the model that they describe."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch

    from m3model.model import M3Model
    from m3model.quantization import Quantization
    from m3model.retrieval import Head

__all__ = [
    "AsJson",
    "BatchTokens",
    "Device",
    "Dtype",
    "Files",
    "FloatType",
    "Lines",
    "MaxLength",
    "Model",
    "OptionalModel",
    "Quantize",
    "Weights",
    "existing_files",
    "load_model",
    "parse_weights",
    "torch_dtype",
]


class FloatType(str, Enum):
    """Floating types by name."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def parse_weights(text: str, head: Head = "all") -> tuple[float, float, float]:
    """Three weights out of "1,0.3,1", or those published for this head under a benchmark's name."""
    from m3model.retrieval.presets import PRESETS
    from m3model.scoring import check_weights

    if text in PRESETS:
        published = PRESETS[text]
        return (*published.dense_sparse, 0.0) if head == "dense+sparse" else published.all
    try:
        dense, sparse, multi_vector = (float(part) for part in text.split(","))
        check_weights((dense, sparse, multi_vector))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r}; accepted: three numbers of at least 0 for dense, sparse and multi-vector such as 1,0.3,1,"
            f" the first two not both 0, or one of {', '.join(PRESETS)}",
            param_hint="--weights",
        ) from error
    return dense, sparse, multi_vector


def existing_files(value: list[Path] | Path | None) -> list[Path] | Path | None:
    """Callback of arguments that name files or, with -, stdin. (typer's own check takes - for a missing file.)"""
    for path in [value] if isinstance(value, Path) else value or []:
        if str(path) != "-" and not path.is_file():
            raise typer.BadParameter(f"there is no file {str(path)!r}")
    return value


_MODEL = typer.Option(
    "--model", "-m", envvar="M3_MODEL", help="Model folder, or hub id such as BAAI/bge-m3.", metavar="MODEL"
)
Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
Files = Annotated[
    list[Path] | None,
    typer.Argument(
        callback=existing_files,
        help="Texts: JSON lines with a text and perhaps an id and a title (.jsonl, .json, also .gz), or plain text"
        " files, each of them one text. - or nothing: stdin, JSON lines or a text on each line.",
        show_default=False,
    ),
]
Lines = Annotated[bool, typer.Option("--lines", help="Every line of a plain text file is a text of its own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[FloatType, typer.Option(help="Type that the model computes in.")]
Quantize = Annotated[
    Literal["int8", "bf16"] | None,
    typer.Option(
        help="Weights of the encoder's linear layers in int8 or bfloat16 [default: as in the model's folder].",
        show_default=False,
    ),
]
MaxLength = Annotated[int, typer.Option(min=3, help="Tokens at which longer texts are cut.")]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens of one forward pass [default: 4096 on a CPU, 65536 on a GPU].")
]
Weights = Annotated[
    str,
    typer.Option(
        help="Weights of dense, sparse and multi-vector in the sums, or the benchmark whose published ones to take:"
        " miracl, mkqa, mldr, beir.",
        metavar="D,S,M|NAME",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def torch_dtype(name: FloatType) -> torch.dtype:
    """The torch dtype of this name."""
    import torch

    dtype: torch.dtype = getattr(torch, name.value)
    return dtype


def load_model(model: str, device: str, dtype: FloatType, quantize: Quantization | None = None) -> M3Model:
    """The model, or an error that says what is wrong with the arguments."""
    import torch

    from m3model.model import M3Model

    try:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise typer.BadParameter("torch sees no GPU here", param_hint="--device")
    except RuntimeError as error:
        raise typer.BadParameter(f"{device!r} is no device: cpu, cuda, cuda:1 ...", param_hint="--device") from error
    return M3Model.from_pretrained(model, dtype=torch_dtype(dtype), device=place, quantize=quantize)
