"""Tiny model folders with random weights, made by transformers' own classes and a tiny tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

_ENGLISH = """the of and to in is a river mountain city bridge matrix vector eigenvalue how do i compute what where
query passage north south symmetric sort list open file close"""
WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:;!?äöüß的是东京भाрус", *_ENGLISH.split()]
SPECIAL = {"xlm-roberta": ["<s>", "<pad>", "</s>", "<unk>"], "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]}


def tiny_tokenizer(model_type: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A unigram tokenizer (XLM-RoBERTa's kind) with special tokens of the model type, and its configuration."""
    special = SPECIAL[model_type]
    pieces = sorted({"▁", *WORDS, *("▁" + word for word in WORDS)})
    unknown = next(number for number, token in enumerate(special) if "unk" in token.lower())
    vocabulary = [(token, 0.0) for token in special] + [(piece, -float(len(WORDS)) / len(piece)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(special)
    cls, sep = ("<s>", "</s>") if model_type == "xlm-roberta" else ("[CLS]", "[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} {sep} $B {sep}",
        special_tokens=[(cls, special.index(cls)), (sep, special.index(sep))],
    )
    pad, unk = (next(token for token in special if kind in token.lower()) for kind in ("pad", "unk"))
    names = {"cls_token": cls, "bos_token": cls, "sep_token": sep, "eos_token": sep, "pad_token": pad, "unk_token": unk}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **names}


def tiny_encoder(
    model_type: str, *, max_length: int = 8192, hidden: int = 64, heads: int = 2, layers: int = 2, seed: int = 0
) -> torch.nn.Module:
    """XLMRobertaModel or BertModel with random weights larger than the usual ones, so that attention is not uniform."""
    torch.manual_seed(seed)
    vocabulary = tiny_tokenizer(model_type)[0].get_vocab_size()
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
    }
    if model_type == "xlm-roberta":
        config = XLMRobertaConfig(**sizes, max_position_embeddings=max_length + 2, type_vocab_size=1, pad_token_id=1)
        model = XLMRobertaModel(config)
    else:
        model = BertModel(BertConfig(**sizes, max_position_embeddings=max_length, type_vocab_size=2, pad_token_id=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.2))
    return model.eval()


def write_folder(
    folder: Path,
    model_type: str = "xlm-roberta",
    *,
    section: dict[str, Any] | None = None,
    multi_vector_dim: int | None = None,
    heads: bool = True,
    **sizes: Any,
) -> Path:
    """A folder in the layout of BAAI/bge-m3; `section` is the "m3" entry of config.json."""
    encoder = tiny_encoder(model_type, **sizes)
    encoder.save_pretrained(folder)
    tokenizer, settings = tiny_tokenizer(model_type)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if section is not None:
        change_config(folder, m3=section)
    if heads:
        width = encoder.config.hidden_size
        dim = multi_vector_dim or width
        sparse = {"weight": torch.randn(1, width) * 0.3, "bias": torch.randn(1) * 0.1}
        torch.save(sparse, folder / "sparse_linear.pt")
        torch.save(
            {"weight": torch.randn(dim, width) * width**-0.5, "bias": torch.randn(dim) * 0.1},
            folder / "colbert_linear.pt",
        )
    return folder


def change_config(folder: Path, **entries: Any) -> None:
    """Change entries of config.json; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values.update(entries)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
