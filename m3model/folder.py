"""Reading and writing a model folder in the layout of BAAI/bge-m3.

    config.json
    model.safetensors | model.safetensors.index.json + shards | pytorch_model.bin | its index + shards
    sparse_linear.pt  {weight [1, E], bias [1]}        colbert_linear.pt  {weight [C, E], bias [C]}
    tokenizer.json, tokenizer_config.json, ...

Pickled files are read with weights_only=True. A folder is written beside its target, flushed to disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3model.files import flush

__all__ = ["atomic_folder", "check_state", "encoder_weights", "head_weights", "locate", "write_weights"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "*_linear.pt", "*.model", "vocab.txt")
_IGNORED = ("pooler.", "lm_head.", "cls.", "classifier.", "embeddings.position_ids")


def locate(path_or_hub_id: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The local folder, or the downloaded snapshot of a Hugging Face hub id ("owner/name").

    Raises:
        FileNotFoundError: there is no such folder, and no such id can be had from the hub.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.exists():
        raise FileNotFoundError(f"{name} is a file; expected a model folder or a hub id such as BAAI/bge-m3")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise FileNotFoundError(f"there is no folder {name!r}, and it is no hub id such as BAAI/bge-m3")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, cache_dir=cache_dir, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"])
        )
    except Exception as error:
        raise FileNotFoundError(f"there is no folder {name!r}, and the hub gave no model {name!r}: {error}") from error


def encoder_weights(folder: Path) -> dict[str, Tensor]:
    """All encoder weights of a folder under the names of XLMRobertaModel / BertModel, without pooler and LM head.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a file is damaged.
    """
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        state.update(_read(path))
    renamed = {_plain_name(name): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in renamed.items() if not name.startswith(_IGNORED)}


def head_weights(folder: Path, name: str) -> dict[str, Tensor] | None:
    """Contents of sparse_linear.pt or colbert_linear.pt, None if the folder has none.

    Raises:
        ValueError: the file is damaged or not a pair of weight and bias.
    """
    path = folder / name
    if not path.is_file():
        return None
    state = _read(path)
    if set(state) != {"weight", "bias"}:
        raise ValueError(f"{path} holds {sorted(state)}; expected weight and bias")
    return state


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Check names, shapes and values of loaded weights.

    Raises:
        ValueError: naming what is missing, surplus, of another shape than config.json says, NaN or infinite.
    """
    missing = sorted(set(expected) - set(state))
    surplus = sorted(set(state) - set(expected))
    if missing or surplus:
        parts = [
            f"{kind}: {_shortened(names)}" for kind, names in (("missing", missing), ("unknown", surplus)) if names
        ]
        raise ValueError(f"the weights in {source} are not those that config.json describes; {'; '.join(parts)}")
    wrong = [
        f"{name} is {tuple(state[name].shape)}, config.json says {tuple(like.shape)}"
        for name, like in expected.items()
        if state[name].shape != like.shape
    ]
    if wrong:
        raise ValueError(f"sizes in config.json disagree with the weights in {source}: {_shortened(wrong)}")
    for name, tensor in state.items():
        if tensor.dtype == torch.int8 and expected[name].dtype == torch.int8:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} in {source} has dtype {tensor.dtype}; accepted: floating point")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} in {source} holds NaN or infinite values as {tensor.dtype}")


def write_weights(folder: Path, encoder: Mapping[str, Tensor], heads: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write model.safetensors and the head files."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    for name, state in heads.items():
        torch.save({key: tensor.detach().cpu().clone() for key, tensor in state.items()}, folder / name)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends without an error.

    Its files are flushed to disk before the rename, so `target` is at any time the old folder or the complete new one
    (or, for an instant between two renames, absent). Files of the old folder that are no part of a model stay in it.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; a model is saved into a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    try:
        yield fresh
        mask = _umask()
        for path in (*fresh.iterdir(), fresh):
            path.chmod((0o777 if path is fresh else 0o666) & ~mask)
            flush(path)
        _replace(target, fresh)
        flush(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace(target: Path, fresh: Path) -> None:
    if not target.exists():
        os.rename(fresh, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, aside / "folder")
    os.rename(fresh, target)
    for path in (aside / "folder").iterdir():
        if not (target / path.name).exists() and not _is_weight_file(path.name):
            os.rename(path, target / path.name)
    shutil.rmtree(aside)


def _is_weight_file(name: str) -> bool:
    return name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = [folder / shard for shard in _shard_names(index)]
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise FileNotFoundError(f"{index} names shards that are not in the folder: {', '.join(absent)}")
            return shards
    raise FileNotFoundError(f"{folder} has no weights: expected {' or '.join(_WEIGHTS)}, whole or in shards")


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names the shard {name!r}; accepted: names of files in the same folder")
    return names


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    except Exception as error:
        raise ValueError(f"{path} is damaged or no file of weights: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return loaded


def _plain_name(name: str) -> str:
    """Name without the prefix of a task model and with today's names of LayerNorm's parameters."""
    for prefix in ("roberta.", "bert."):
        name = name.removeprefix(prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
