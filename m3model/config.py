"""M3Config: what an M3 folder's config.json says about the encoder, and its section "m3" about the three heads.

The encoder part keeps the names of Hugging Face's XLMRobertaConfig and BertConfig; keys that are not used here are kept
and written back, so that a folder saved by this package is still that model for transformers and FlagEmbedding.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from m3model.quantization import Quantization, check_quantization

__all__ = ["M3Config", "Pooling"]

Pooling = Literal["cls", "mean"]
_MODEL_TYPES = ("xlm-roberta", "bert")
_QUANTIZED_BY = "m3kernels"
_HEAD_KEYS = ("pooling", "query_prefix", "passage_prefix", "multi_vector_dim", "ignored_token_ids")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


@dataclass(frozen=True)
class M3Config:
    """Sizes of the encoder and settings of the heads.

    Attributes:
        model_type: "xlm-roberta" or "bert"; they differ in how positions are numbered.
        pooling: dense vector = state of the first token ("cls") or mean over all tokens ("mean").
        query_prefix, passage_prefix: put before every text of that role, as backbones of the E5 family want it.
        multi_vector_dim: width of the multi-vector rows.
        ignored_token_ids: ids that never enter the sparse vector: cls, eos, pad and unk. M3Model takes them from its
            tokenizer, if it has one.
        quantization: of the encoder's linear layers, see M3Model.quantize; in config.json as `quantization_config`.
        others: keys of config.json that are not used here, kept for saving.

    Raises:
        ValueError: a size is not positive, sizes do not fit each other, or a setting is not one that is supported.
    """

    model_type: str = "xlm-roberta"
    vocab_size: int = 250002
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 8194
    type_vocab_size: int = 1
    pad_token_id: int = 1
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pooling: Pooling = "cls"
    query_prefix: str = ""
    passage_prefix: str = ""
    multi_vector_dim: int = 1024
    ignored_token_ids: tuple[int, ...] = (0, 2, 1, 3)
    quantization: Quantization | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model_type not in _MODEL_TYPES:
            raise ValueError(f"model_type is {self.model_type!r}; supported: {', '.join(_MODEL_TYPES)}")
        for name in (*_SIZES, "multi_vector_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; accepted: a whole number of at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.max_length < 1:
            raise ValueError(f"max_position_embeddings {self.max_position_embeddings} leaves no position for a token")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {self.pooling!r}; accepted: {', '.join(get_args(Pooling))}")
        if self.quantization is not None:
            check_quantization("quantization", self.quantization)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: at least 0, below 1")

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token uses: RoBERTa starts after the padding row, BERT at 0."""
        return self.pad_token_id + 1 if self.model_type == "xlm-roberta" else 0

    @property
    def max_length(self) -> int:
        """Longest text in tokens that the position table serves, cls and eos included."""
        return self.max_position_embeddings - self.first_position

    def with_max_length(self, max_length: int) -> M3Config:
        """The same configuration with a position table for `max_length` tokens."""
        return replace(self, max_position_embeddings=max_length + self.first_position)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> M3Config:
        """From the contents of a config.json.

        Raises:
            ValueError: a size is missing, or the file asks for something that this encoder does not do.
        """
        _refuse_unsupported(values)
        missing = [name for name in ("model_type", *_SIZES) if values.get(name) is None]
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        section = dict(values.get("m3") or {})
        unknown = sorted(set(section) - set(_HEAD_KEYS))
        if unknown:
            raise ValueError(f'config.json has unknown entries in "m3": {", ".join(unknown)}')
        encoder_names = [
            entry.name for entry in fields(cls) if entry.name not in (*_HEAD_KEYS, "others", "quantization")
        ]
        encoder = {name: values[name] for name in encoder_names if values.get(name) is not None}
        encoder.setdefault("pad_token_id", 1 if values["model_type"] == "xlm-roberta" else 0)
        section.setdefault("multi_vector_dim", values["hidden_size"])
        section["ignored_token_ids"] = tuple(section.get("ignored_token_ids", _special_ids(values)))
        used = (*encoder_names, "m3", "quantization_config")
        others = {key: value for key, value in values.items() if key not in used}
        quantization = (values.get("quantization_config") or {}).get("weights")
        return cls(**encoder, **section, quantization=quantization, others=others)

    @classmethod
    def from_file(cls, path: Path) -> M3Config:
        """From a config.json.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not valid JSON, or as `from_dict`.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} has no config.json; an M3 folder needs one")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected an object")
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_json_string(self) -> str:
        """config.json as text; the loggers of transformers ask for it."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, readable by transformers."""
        values = asdict(self)
        others = values.pop("others")
        section = {key: values.pop(key) for key in _HEAD_KEYS}
        quantization = values.pop("quantization")
        if quantization is not None:
            others["quantization_config"] = {"quant_method": _QUANTIZED_BY, "weights": quantization}
        section["ignored_token_ids"] = list(section["ignored_token_ids"])
        architecture = "XLMRobertaModel" if self.model_type == "xlm-roberta" else "BertModel"
        defaults = {"architectures": [architecture], "hidden_act": "gelu", "position_embedding_type": "absolute"}
        return {**defaults, **others, **values, "m3": section}


def _refuse_unsupported(values: dict[str, Any]) -> None:
    """This encoder computes exactly one variant; anything else in the file would silently give other vectors."""
    for name, accepted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if values.get(name, accepted) != accepted:
            raise ValueError(f"{name} is {values[name]!r}; supported: {accepted!r}")
    method = (values.get("quantization_config") or {}).get("quant_method", _QUANTIZED_BY)
    if method != _QUANTIZED_BY:
        raise ValueError(f"quantization_config has quant_method {method!r}; supported: {_QUANTIZED_BY!r}")
    for name in ("is_decoder", "add_cross_attention"):
        if values.get(name):
            raise ValueError(f"{name} is set; supported: encoders only")


def _special_ids(values: dict[str, Any]) -> tuple[int, ...]:
    """Special ids that config.json itself names; the tokenizer, where there is one, knows all of them."""
    named = (values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    ids = [token for token in named if isinstance(token, int)]
    return (*ids, 3) if values["model_type"] == "xlm-roberta" else tuple(ids)
