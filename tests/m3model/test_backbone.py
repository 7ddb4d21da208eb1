"""The packed encoder gives what transformers' XLMRobertaModel and BertModel give on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_encoder, write_folder
from torch import Tensor

from m3kernels import offsets_from_lengths
from m3model import M3Config, M3Model
from m3model.backbone import PackedEncoder

MODEL_TYPES = ("xlm-roberta", "bert")
LENGTHS = [1, 2, 3, 7, 64, 65, 200, 511]


def packed(model_type: str, **sizes: int) -> tuple[PackedEncoder, torch.nn.Module]:
    """Our encoder and transformers' with the same random weights."""
    theirs = tiny_encoder(model_type, **sizes)
    ours = PackedEncoder(M3Config.from_dict(theirs.config.to_dict())).eval()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("pooler.")}
    ours.load_state_dict(state)
    return ours, theirs


def random_ids(encoder: PackedEncoder, lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, encoder.config.vocab_size, (sum(lengths),), dtype=torch.int32)
    return ids, offsets_from_lengths(torch.tensor(lengths))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_encoder_equals_transformers_on_a_padded_batch(model_type: str) -> None:
    ours, theirs = packed(model_type)
    ids, offsets = random_ids(ours, LENGTHS)
    padded = torch.full((len(LENGTHS), max(LENGTHS)), ours.config.pad_token_id)
    mask = torch.zeros_like(padded)
    for row, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        padded[row, : end - begin] = ids[begin:end]
        mask[row, : end - begin] = 1
    with torch.no_grad():
        hidden = ours(ids, offsets)
        expected = theirs(padded, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("length", [1, 2, 33, 1000, 4097, 8192])
def test_packed_encoder_equals_transformers_on_single_texts(model_type: str, length: int) -> None:
    ours, theirs = packed(model_type, layers=1)
    ids, offsets = random_ids(ours, [length])
    with torch.no_grad():
        hidden = ours(ids, offsets)
        expected = theirs(ids[None].long()).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def test_packed_encoder_equals_transformers_at_every_length_to_300() -> None:
    ours, theirs = packed("xlm-roberta", layers=1)
    ids, offsets = random_ids(ours, list(range(1, 301)))
    with torch.no_grad():
        hidden = ours(ids, offsets)
        for begin, end in zip(offsets, offsets[1:]):
            expected = theirs(ids[None, begin:end].long()).last_hidden_state[0]
            torch.testing.assert_close(hidden[begin:end], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_equal_transformers(model_type: str) -> None:
    ours, theirs = packed(model_type)
    ids, offsets = random_ids(ours, [40])
    direction = torch.randn(40, ours.config.hidden_size)
    (ours(ids, offsets) * direction).sum().backward()
    (theirs(ids[None].long()).last_hidden_state[0] * direction).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if not name.startswith("pooler.")}
    for name, parameter in ours.named_parameters():
        if ".self.qkv." in name:
            parts = [expected.pop(name.replace("qkv", part)) for part in ("query", "key", "value")]
            reference = torch.cat(parts)
        else:
            reference = expected.pop(name)
        scale = float(reference.abs().max())
        torch.testing.assert_close(parameter.grad, reference, atol=2e-5 * scale, rtol=1e-4)
    assert not expected


def test_state_dict_has_exactly_the_names_and_values_of_transformers() -> None:
    ours, theirs = packed("xlm-roberta")
    state = ours.state_dict()
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("pooler.")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def training_encoder(**dropout: float) -> PackedEncoder:
    values = tiny_encoder("bert").config.to_dict() | dropout
    encoder = PackedEncoder(M3Config.from_dict(values)).train()
    torch.manual_seed(5)
    encoder.initialize()
    return encoder


@pytest.mark.parametrize("kind", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_and_not_in_evaluation(kind: str) -> None:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = training_encoder(**(off | {kind: 0.5}))
    ids, offsets = random_ids(encoder, [30, 12])
    torch.manual_seed(1)
    first, second = encoder(ids, offsets), encoder(ids, offsets)
    assert not torch.allclose(first, second)
    torch.manual_seed(1)
    assert torch.equal(encoder(ids, offsets), first)
    encoder.eval()
    assert torch.equal(encoder(ids, offsets), encoder(ids, offsets))


def test_gradient_checkpointing_changes_no_gradient_with_dropout_on() -> None:
    encoder = training_encoder(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    ids, offsets = random_ids(encoder, [30, 12])
    grads = []
    for enabled in (False, True):
        encoder.gradient_checkpointing = enabled
        encoder.zero_grad()
        torch.manual_seed(3)
        encoder(ids, offsets).square().mean().backward()
        grads.append([parameter.grad for parameter in encoder.parameters()])
    for plain, again in zip(*grads):
        torch.testing.assert_close(plain, again, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path / "m")
    texts = ["how do i compute the eigenvalue of a symmetric matrix", "river"]
    exact = M3Model.from_pretrained(folder).encode(texts)
    half = M3Model.from_pretrained(folder, dtype=dtype).encode(texts)
    cosine = (torch.from_numpy(exact.dense) * torch.from_numpy(half.dense)).sum(1)
    # Errors of the 2 layers' roughly 20 rounded operations add up like a random walk of steps eps on unit vectors.
    assert (1 - cosine).max() < (20 * torch.finfo(dtype).eps) ** 2, cosine


def test_weights_changed_in_place_are_seen_at_once() -> None:
    ours, theirs = packed("bert")
    ids, offsets = random_ids(ours, [40, 30])
    with torch.no_grad():
        before = ours(ids, offsets)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(ids, offsets).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        stepped = ours(ids, offsets)
        expected = ours.train()(ids, offsets) if ours.config.hidden_dropout_prob == 0 else None
    assert not torch.allclose(before, stepped)
    with torch.enable_grad():
        plain = ours.eval()(ids, offsets)
    torch.testing.assert_close(stepped, plain.detach(), atol=1e-5, rtol=1e-5)
    assert expected is None or torch.allclose(expected, stepped, atol=1e-5)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("pooler.")}
    ours.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(ours(ids, offsets), before)


def resident_peak(reset: bool) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def test_memory_of_encoding_does_not_grow_with_the_layers() -> None:
    sizes = {"vocab_size": 100, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    tokens = 1024
    risen = {}
    for layers in (1, 6):
        encoder = PackedEncoder(M3Config(**sizes, num_hidden_layers=layers)).eval()
        encoder.initialize()
        ids, offsets = random_ids(encoder, [tokens])
        with torch.no_grad():
            encoder(ids, offsets)
            before = resident_peak(reset=True)
            encoder(ids, offsets)
        risen[layers] = resident_peak(reset=False) - before
    # A layer's own rows, kept, would be the 3 + 4 + 2 times 4 MiB of its products for each of 5 more layers.
    assert risen[6] < risen[1] + 9 * 2**22, risen
    # In proportion, less than the 1 GiB at 8192 tokens that the whole model of 24 layers may take.
    assert risen[6] < 2**30 * tokens // 8192, risen
