"""Model folders: what is read, what is written, and what each fault is called."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_config, tiny_encoder, write_folder
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from m3model import M3Model
from m3model import folder as folders
from m3model.model import INITIAL_TOKEN_WEIGHT

TEXTS = ["how do i compute the eigenvalue", "river", ""]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder that the test may change."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def same(first: M3Model, second: M3Model) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("model_type", ["xlm-roberta", "bert"])
def test_saving_and_loading_again_changes_nothing(tmp_path: Path, model_type: str) -> None:
    section = {"pooling": "mean", "query_prefix": "query: ", "passage_prefix": "passage: "}
    model = M3Model.from_pretrained(
        write_folder(tmp_path / "m", model_type, section=section, multi_vector_dim=24), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "saved")
    again = M3Model.from_pretrained(tmp_path / "saved")
    assert same(model, again)
    dtypes = {"torch_dtype": 0, "dtype": 0}
    assert again.config.to_dict() | dtypes == model.config.to_dict() | dtypes
    assert again.config.pooling == "mean" and again.config.multi_vector_dim == 24
    assert torch.equal(again.tokenize(TEXTS, role="query")[0], model.tokenize(TEXTS, role="query")[0])


def test_a_model_is_saved_over_its_own_folder_and_other_files_stay(copy: Path) -> None:
    (copy / "README.md").write_text("ours")
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    model = M3Model.from_pretrained(copy)
    with torch.no_grad():
        model.sparse_linear.bias.fill_(7.0)
    model.save_pretrained(copy)
    assert same(model, M3Model.from_pretrained(copy))
    assert (copy / "README.md").read_text() == "ours" and not (copy / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    assert all(os.stat(path).st_mode & 0o044 for path in copy.iterdir() if os.umask(os.umask(0)) == 0o022)


def test_transformers_loads_what_was_saved(copy: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    M3Model.from_pretrained(copy).save_pretrained(tmp_path / "saved")
    theirs = AutoModel.from_pretrained(tmp_path / "saved").state_dict()
    expected = AutoModel.from_pretrained(copy).state_dict()
    assert all(torch.equal(theirs[name], expected[name]) for name in expected if not name.startswith("pooler."))


def test_an_error_while_saving_leaves_the_old_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    model = M3Model.from_pretrained(copy)

    def full_disk(*_arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(folders, "write_weights", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("layout", ["bin", "sharded safetensors", "sharded bin", "task model", "old names"])
def test_every_layout_of_weights_is_read(copy: Path, layout: str, model: M3Model) -> None:
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(state)
    shards = [{name: state[name] for name in names[:9]}, {name: state[name] for name in names[9:]}]
    if layout == "bin":
        torch.save(state, copy / "pytorch_model.bin")
    elif layout == "task model":
        prefixed = {f"roberta.{name}": tensor for name, tensor in state.items()}
        save_file(prefixed | {"lm_head.bias": torch.zeros(3)}, copy / "model.safetensors")
    elif layout == "old names":
        old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in state.items()}
        old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in old.items()}
        torch.save(old | {"embeddings.position_ids": torch.arange(5)}, copy / "pytorch_model.bin")
    else:
        name = "model.safetensors" if "safetensors" in layout else "pytorch_model.bin"
        files = [f"shard-{number}.{name.split('.')[1]}" for number in range(2)]
        for file, shard in zip(files, shards):
            (save_file if name.endswith("safetensors") else torch.save)(shard, copy / file)
        weight_map = {key: file for file, shard in zip(files, shards) for key in shard}
        (copy / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(M3Model.from_pretrained(copy), model)


def test_positions_are_extended_and_the_old_ones_keep_their_vectors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", max_length=40)
    model = M3Model.from_pretrained(folder)
    short = model.encode(TEXTS).dense
    model.extend_positions(100)
    assert model.max_length == 100
    table = model.backbone.embeddings.position_embeddings.weight
    assert table.shape[0] == 102 and torch.equal(table[2:42], table[42:82]) and torch.equal(table[2:22], table[82:])
    assert (model.encode(TEXTS).dense == short).all()
    ids, _ = model.tokenize(["the river " * 45], max_length=100)
    assert 90 < len(ids) <= 100
    model.save_pretrained(tmp_path / "long")
    again = M3Model.from_pretrained(tmp_path / "long")
    assert again.max_length == 100 and same(model, again)
    settings = json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 100
    with pytest.raises(ValueError, match="max_length is 99; the model already serves 100"):
        model.extend_positions(99)


def test_missing_heads_are_an_error_unless_fresh_ones_are_asked_for(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", heads=False)
    with pytest.raises(FileNotFoundError, match=r"sparse_linear\.pt and no colbert_linear\.pt; pass init_heads=True"):
        M3Model.from_pretrained(folder)
    model = M3Model.from_pretrained(folder, init_heads=True)
    assert torch.equal(model.colbert_linear.weight, torch.eye(64))
    weights = model.encode(["river city"]).sparse.to_dicts()[0].values()
    assert len(weights) == 2 and all(weight == pytest.approx(INITIAL_TOKEN_WEIGHT) for weight in weights)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", "sparse_linear.pt"])
def test_a_missing_file_is_named(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    name = "weights" if missing == "model.safetensors" else missing
    with pytest.raises(FileNotFoundError, match=f"copy has no .*{name}"):
        M3Model.from_pretrained(copy)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere/at/all"):
        M3Model.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(FileNotFoundError, match=r"is a file; expected a model folder or a hub id"):
        (tmp_path / "file").write_text("")
        M3Model.from_pretrained(tmp_path / "file")


def test_a_hub_id_is_downloaded_without_subfolders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    M3Model.from_pretrained("BAAI/bge-m3", cache_dir="/somewhere")
    assert asked["name"] == "BAAI/bge-m3" and asked["cache_dir"] == "/somewhere"
    needed = ["config.json", "pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt", "tokenizer.json"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*needed, "onnx/model.onnx", "flax_model.msgpack"], **patterns)) == needed


def test_a_hub_that_gives_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"the hub gave no model 'BAAI/bge-m3': no network"):
        M3Model.from_pretrained("BAAI/bge-m3")


@pytest.mark.parametrize("damaged", ["model.safetensors", "sparse_linear.pt", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_named(copy: Path, damaged: str) -> None:
    content = (copy / damaged).read_bytes()
    (copy / damaged).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{damaged}|tokenizer files in .*copy"):
        M3Model.from_pretrained(copy)


def test_pickled_code_is_not_executed(copy: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"weight": Payload(), "bias": torch.zeros(1)}, copy / "sparse_linear.pt")
    with pytest.raises(ValueError, match=r"sparse_linear\.pt is damaged or no file of weights"):
        M3Model.from_pretrained(copy)
    assert not (tmp_path / "executed").exists()


def test_an_index_cannot_point_outside_the_folder(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    index = {"weight_map": {"embeddings.word_embeddings.weight": "../outside.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the shard '\.\./outside\.safetensors'"):
        M3Model.from_pretrained(copy)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 32}, "disagree with the weights in .*copy.*config.json says"),
        ({"intermediate_size": 100}, r"layer\.0\.intermediate\.dense\.(weight|bias) is \(128.*config.json says \(100"),
        ({"num_hidden_layers": 3}, r"missing: .*layer\.2\."),
        ({"num_hidden_layers": 1}, r"unknown: .*layer\.1\."),
        (
            {"max_position_embeddings": 100},
            r"position_embeddings\.weight is \(8194, 64\), .* says \(100, 64\)",
        ),
        ({"vocab_size": 5000}, r"word_embeddings\.weight is .* config.json says \(5000, 64\)"),
        ({"vocab_size": 50}, r"the tokenizer has \d+ ids, but vocab_size is 50"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: xlm-roberta, bert"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported: 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is set; supported: encoders only"),
        ({"m3": {"pooling": "max"}}, "pooling is 'max'; accepted: cls, mean"),
        ({"m3": {"poling": "cls"}}, 'unknown entries in "m3": poling'),
    ],
)
def test_a_config_that_disagrees_is_refused(copy: Path, entries: dict[str, object], message: str) -> None:
    change_config(copy, **entries)
    with pytest.raises(ValueError, match=message):
        M3Model.from_pretrained(copy)


def test_heads_of_the_wrong_shape_are_refused(copy: Path) -> None:
    torch.save({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, copy / "sparse_linear.pt")
    with pytest.raises(ValueError, match=r"sparse_linear\.weight is \(1, 32\), config.json says \(1, 64\)"):
        M3Model.from_pretrained(copy)
    torch.save({"weight": torch.zeros(1, 64)}, copy / "sparse_linear.pt")
    with pytest.raises(ValueError, match=r"sparse_linear\.pt holds \['weight'\]; expected weight and bias"):
        M3Model.from_pretrained(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_refused_by_name(copy: Path, value: float) -> None:
    state = load_file(copy / "model.safetensors")
    state["encoder.layer.1.output.dense.weight"][3, 4] = value
    save_file(state, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.weight in .* holds NaN or infinite values"):
        M3Model.from_pretrained(copy)


def test_weights_that_float16_cannot_hold_are_refused(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    state["embeddings.LayerNorm.bias"][0] = 1e5
    save_file(state, copy / "model.safetensors")
    assert M3Model.from_pretrained(copy).dtype == torch.float32
    with pytest.raises(ValueError, match=r"LayerNorm\.bias in .* holds NaN or infinite values as torch\.float16"):
        M3Model.from_pretrained(copy, dtype=torch.float16)


def test_a_dtype_that_no_model_has_is_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; accepted: torch\.float32"):
        M3Model.from_pretrained(copy, dtype=torch.int8)


def test_weights_saved_in_half_precision_are_loaded_as_float32(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    tiny_encoder("xlm-roberta").half().save_pretrained(folder)
    assert M3Model.from_pretrained(folder).dtype == torch.float32
