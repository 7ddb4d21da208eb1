"""M3Model: one encoder, three representations of a text (M3-Embedding, arXiv 2402.03216).

    texts -> tokenize -> packed token ids [T], offsets [N + 1] -> PackedEncoder -> hidden [T, E]
          -> dense [N, E], sparse (token weights), multi-vector rows [T - N, C]

Folders have the layout of BAAI/bge-m3 (see m3model.folder); outputs equal those of FlagEmbedding on the same weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from m3kernels import sparse_embed
from m3kernels._checks import check_offset_values, check_offsets, check_tensor
from m3model import folder as folders
from m3model.backbone import PackedEncoder
from m3model.config import M3Config
from m3model.embeddings import EncodedTexts, M3Embeddings
from m3model.encoding import (
    DEFAULT_WINDOW_CHARACTERS,
    EncodingOptions,
    encode_texts,
    encode_windows,
    pack_ids,
    windows,
)
from m3model.heads import dense_vectors, multi_vectors
from m3model.quantization import Quantization, check_quantization, quantize_layers, stored_as_they_are
from m3model.scoring import DEFAULT_WEIGHTS, check_weights, score_embeddings
from m3model.tokenizer import Role, TextTokenizer, checked_strings, warn_of_cuts

__all__ = ["INITIAL_TOKEN_WEIGHT", "M3Model", "Role"]

INITIAL_TOKEN_WEIGHT = 0.02
"""Weight that a fresh sparse head gives every token: so small that counted tokens decide between texts that the other
two scores hold for equal. Summary -> body over 120 docstrings of torch and numpy, embedded backbone, MRR@10: dense
0.780, dense + sparse + multi-vector 0.781 with 0.02, 0.768 with 0.1, 0.685 with 0.3. One draw of pairs, on which
0.02 was also chosen: its lead over dense is within the noise."""

_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class M3Model(nn.Module):
    """Encoder and heads.

    Attributes:
        config: sizes and settings, saved with the model.
        tokenizer: None for a model made from a configuration alone.
        backbone: the encoder; sparse_linear: [E] -> token weight; colbert_linear: [E] -> multi-vector row.
        normalize: dense vectors and multi-vector rows have unit length (True) or are left as they are.
    """

    def __init__(self, config: M3Config, tokenizer: TextTokenizer | None = None) -> None:
        """A model with random encoder weights and fresh heads (see `initialize_heads`)."""
        super().__init__()
        if tokenizer is not None:
            if len(tokenizer) > config.vocab_size:
                raise ValueError(f"the tokenizer has {len(tokenizer)} ids, but vocab_size is {config.vocab_size}")
            config = replace(config, ignored_token_ids=tokenizer.special_ids)
        self.config = config
        self.tokenizer = tokenizer
        self.normalize = True
        self.backbone = PackedEncoder(config)
        self.sparse_linear = nn.Linear(config.hidden_size, 1)
        self.colbert_linear = nn.Linear(config.hidden_size, config.multi_vector_dim)
        if self.sparse_linear.weight.device.type != "meta":
            self.backbone.initialize()
            self.initialize_heads()
        if config.quantization is not None:
            quantize_layers(self.backbone, config.quantization)
            self.eval()

    @property
    def device(self) -> torch.device:
        return self.sparse_linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sparse_linear.weight.dtype

    @property
    def max_length(self) -> int:
        """Longest text in tokens that the position table serves."""
        return self.config.max_length

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        init_heads: bool = False,
        quantize: Quantization | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> M3Model:
        """Load a model folder, or a model of the Hugging Face hub, in evaluation mode.

        Args:
            path_or_hub_id: a folder, or an id such as "BAAI/bge-m3".
            dtype: float32 (default), bfloat16, float16 or float64, whatever the file holds.
            device: default the CPU.
            init_heads: make fresh heads for those that the folder lacks, instead of an error.
            quantize: "int8" or "bf16", as `quantize`; a folder saved so needs no argument.
            cache_dir: where the hub's files are kept; default that of huggingface_hub.

        Raises:
            FileNotFoundError: no such folder or id, or no config, weights, tokenizer or head in it.
            ValueError: a file is damaged, sizes disagree, weights are NaN or infinite in `dtype`, dtype or
                quantize not as above, or the folder is quantized in another way.
        """
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in _MODEL_DTYPES:
            raise ValueError(f"dtype is {dtype}; accepted: {', '.join(str(accepted) for accepted in _MODEL_DTYPES)}")
        if quantize is not None:
            check_quantization("quantize", quantize)
        folder = folders.locate(path_or_hub_id, cache_dir)
        config = M3Config.from_file(folder / "config.json")
        if quantize is not None and config.quantization not in (None, quantize):
            raise ValueError(f"quantize is {quantize!r}, but {folder} is quantized as {config.quantization!r}")
        encoder = folders.encoder_weights(folder)
        sparse = folders.head_weights(folder, "sparse_linear.pt")
        colbert = folders.head_weights(folder, "colbert_linear.pt")
        if not init_heads and (sparse is None or colbert is None):
            absent = [name for name, head in (("sparse_linear.pt", sparse), ("colbert_linear.pt", colbert)) if not head]
            raise FileNotFoundError(
                f"{folder} has no {' and no '.join(absent)}; pass init_heads=True to start with fresh heads"
            )
        if colbert is not None and colbert["weight"].dim() == 2:
            config = replace(config, multi_vector_dim=colbert["weight"].shape[0])
        tokenizer = TextTokenizer.from_folder(folder)
        with torch.device("meta"):
            model = cls(config, tokenizer)
        expected = model.state_dict()
        state = {f"backbone.{name}": tensor for name, tensor in encoder.items()}
        for head, weights in (("sparse_linear", sparse), ("colbert_linear", colbert)):
            state |= {f"{head}.{name}": tensor for name, tensor in (weights or {}).items()}
        kept = stored_as_they_are(expected)
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() and name not in kept else tensor
            for name, tensor in state.items()
        }
        fresh = {
            name: torch.empty(tensor.shape, dtype=dtype)
            for name, tensor in expected.items()
            if name not in state and not name.startswith("backbone.")
        }
        folders.check_state(
            state, {name: tensor for name, tensor in expected.items() if name not in fresh}, str(folder)
        )
        model.load_state_dict({**state, **fresh}, assign=True)
        model.initialize_heads(sparse=sparse is None, multi_vector=colbert is None)
        if quantize is not None and config.quantization is None:
            model.quantize(quantize)
        return model.to(device if device is not None else "cpu").eval()

    def quantize(self, quantization: Quantization) -> M3Model:
        """Keep the weights of the encoder's linear layers in int8 or bfloat16, for good; returns the model, evaluating.

        They take a quarter or half of the memory and are constant from then on, so the model can no longer be trained;
        embeddings, LayerNorm and heads stay as they are. int8 has one scale for each output, and on a CPU multiplies
        activations of 8 bits; a GPU unpacks the weights in every call. `save_pretrained` keeps the quantized weights.

        Raises:
            ValueError: quantization is neither "int8" nor "bf16", the model is float64, or is quantized already.
        """
        check_quantization("quantization", quantization)
        if self.config.quantization is not None:
            raise ValueError(f"the model is quantized as {self.config.quantization!r} already")
        if self.dtype == torch.float64:
            raise ValueError("the model is float64; quantized layers accept float32, bfloat16, float16")
        quantize_layers(self.backbone, quantization)
        self.config = self.backbone.config = replace(self.config, quantization=quantization)
        return self.eval()

    def train(self, mode: bool = True) -> M3Model:
        """Training mode or evaluation mode, as of any module.

        Raises:
            ValueError: mode is True and the model is quantized.
        """
        if mode and self.config.quantization is not None:
            raise ValueError(
                f"the model is quantized as {self.config.quantization!r} and cannot be trained; load it without"
                " quantization, train, and quantize the result"
            )
        return super().train(mode)

    def initialize_heads(self, *, sparse: bool = True, multi_vector: bool = True) -> None:
        """Heads with which retrieval works before any training.

        Every token weighs INITIAL_TOKEN_WEIGHT; multi-vector rows are the hidden states (identity), or an orthogonal
        projection of them where the widths differ.
        """
        with torch.no_grad():
            if sparse:
                self.sparse_linear.weight.zero_()
                self.sparse_linear.bias.fill_(INITIAL_TOKEN_WEIGHT)
            if multi_vector:
                out, width = self.colbert_linear.weight.shape
                if out == width:
                    nn.init.eye_(self.colbert_linear.weight)
                else:
                    projection = nn.init.orthogonal_(torch.empty(out, width))
                    self.colbert_linear.weight.copy_(projection)
                self.colbert_linear.bias.zero_()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the model folder that `from_pretrained`, transformers and FlagEmbedding load.

        The folder appears complete or not at all: it is written beside `path`, flushed to disk and renamed. Other files
        of an existing folder stay.

        Raises:
            ValueError: the model has no tokenizer.
            FileExistsError: path is a file.
        """
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; a model folder needs one")
        heads = {
            "sparse_linear.pt": self.sparse_linear.state_dict(),
            "colbert_linear.pt": self.colbert_linear.state_dict(),
        }
        config = self.config.to_dict()
        config["dtype" if "dtype" in config else "torch_dtype"] = str(self.dtype).removeprefix("torch.")
        with folders.atomic_folder(Path(path)) as fresh:
            (fresh / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
            folders.write_weights(fresh, self.backbone.state_dict(), heads)
            for name, content in self.tokenizer.files.items():
                (fresh / name).write_bytes(content)

    def extend_positions(self, max_length: int = 8192) -> None:
        """Lengthen the position table to serve `max_length` tokens; positions that exist keep their vectors.

        A position beyond the old table starts as the one a whole number of old lengths before it. (The paper extends
        XLM-RoBERTa to 8192 and trains on; it does not say with what the new positions start. The embedded, untrained
        backbone finds the page of 197 translated paragraphs from deep inside 48 manual pages with MRR 0.76 (dense) and
        0.86 (multi-vector) when 3072 tokens are read this way, 0.65 and 0.74 when 512 are.)

        Raises:
            ValueError: max_length is below the present one.
        """
        old = self.max_length
        if max_length < old:
            raise ValueError(f"max_length is {max_length}; the model already serves {old} tokens")
        if max_length == old:
            return
        table = self.backbone.embeddings.position_embeddings
        first = self.config.first_position
        weight = table.weight.detach()
        rows = first + torch.arange(max_length, device=weight.device) % old
        longer = nn.Embedding(first + max_length, weight.shape[1], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            longer.weight.copy_(torch.cat([weight[:first], weight[rows]]))
        self.backbone.embeddings.position_embeddings = longer
        self.config = self.backbone.config = self.config.with_max_length(max_length)
        if self.tokenizer is not None:
            self.tokenizer.set_model_max_length(max_length)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """In training, keep only the input of each layer and compute it again in backward."""
        self.backbone.gradient_checkpointing = enabled

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: object = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """`set_gradient_checkpointing` under the name by which transformers.Trainer asks for it.

        Raises:
            ValueError: an option that the backbone does not have.
        """
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ValueError("activation_checkpointing_kwargs are given; accepted: none, every layer is checkpointed")
        self.set_gradient_checkpointing(True)

    def tokenize(
        self,
        texts: Sequence[str],
        max_length: int = 8192,
        *,
        role: Role = "passage",
    ) -> tuple[Tensor, Tensor]:
        """Packed token ids int32 [T] and offsets int32 [N + 1] of texts, on the model's device.

        Args:
            texts: strings; lone surrogates become U+FFFD.
            max_length: longest text in tokens, special tokens included; never more than the model's own. Longer texts
                are cut at the end, with one warning.
            role: which of the model's prefixes goes before each text.

        Raises:
            TypeError: texts is no list of strings.
            ValueError: max_length has no room for a text, role is unknown, or the model has no tokenizer.
        """
        tokenizer, limit, prefix = self.tokenization(max_length, role)
        tokenized = tokenizer.encode(texts, limit, prefix)
        warn_of_cuts([tokenized], limit, stacklevel=3)
        ids, offsets = pack_ids(tokenized.ids)
        return ids.to(self.device), offsets.to(self.device)

    def tokenization(self, max_length: int, role: Role) -> tuple[TextTokenizer, int, str]:
        """The tokenizer, the longest text that max_length and the model allow, and the prefix of `role`.

        Raises:
            ValueError: max_length has no room for a text, role is unknown, or the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; load it from a folder that has one")
        if role not in ("query", "passage"):
            raise ValueError(f"role is {role!r}; accepted: query, passage")
        self.tokenizer.check_max_length(max_length)
        prefix = self.config.query_prefix if role == "query" else self.config.passage_prefix
        return self.tokenizer, min(max_length, self.max_length), prefix

    def forward(
        self,
        token_ids: Tensor,
        offsets: Tensor,
        dense: bool = True,
        sparse: bool = True,
        multi_vector: bool = True,
        *,
        max_length: int | None = None,
    ) -> M3Embeddings[Tensor]:
        """The representations of packed token ids, as tensors with gradients in the model's dtype.

        Args:
            token_ids: int32 [T] with special tokens; offsets: int32 [N + 1]; on the model's device. Every text has at
                least one token.
            dense, sparse, multi_vector: which to compute.
            max_length: an upper bound of the longest text, used on a GPU to size launches; default T.

        Raises:
            TypeError: token_ids or offsets are no int32 tensors.
            ValueError: other shapes or devices; on the CPU also offsets that are no offsets, a text without tokens or
                longer than the position table, ids outside the vocabulary.
        """
        self._check_tokens(token_ids, offsets)
        hidden = self.backbone(token_ids, offsets, max_length)
        return self.heads(hidden, token_ids, offsets, dense=dense, sparse=sparse, multi_vector=multi_vector)

    def heads(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        offsets: Tensor,
        *,
        dense: bool = True,
        sparse: bool = True,
        multi_vector: bool = True,
    ) -> M3Embeddings[Tensor]:
        """The representations of last hidden states [T, E]; otherwise as `forward`."""
        lexical = None
        if sparse:
            head = self.sparse_linear
            lexical = sparse_embed(hidden, head.weight[0], head.bias, token_ids, offsets, self.config.ignored_token_ids)
        rows = None
        if multi_vector:
            projection = self.colbert_linear
            rows = multi_vectors(hidden, projection.weight, projection.bias, offsets, normalize=self.normalize)
        pooled = dense_vectors(hidden, offsets, self.config.pooling, normalize=self.normalize) if dense else None
        return M3Embeddings(pooled, lexical, rows)

    def encode(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        multi_vector: bool = True,
        max_length: int = 8192,
        batch_tokens: int | None = None,
        progress: bool = False,
        role: Role = "passage",
        multi_vector_dtype: torch.dtype = torch.float32,
    ) -> EncodedTexts:
        """The representations of texts, in their order, on the CPU.

        Args:
            texts, max_length, role: as `tokenize`.
            dense, sparse, multi_vector: which to compute; the others are None in the result.
            batch_tokens: rows of one forward pass; texts are grouped by length. A longer text makes a batch of its own.
                Default 4096 on a CPU, 65536 on a GPU.
            progress: show a bar with tokens per second on stderr.
            multi_vector_dtype: float32, bfloat16 or float16; the latter two halve what long collections need.

        Returns:
            dense float32 array [N, E]; sparse with float32 weights; multi_vector rows in multi_vector_dtype.

        Raises:
            TypeError, ValueError: as `tokenize`; also batch_tokens below 1.
        """
        options = EncodingOptions(dense, sparse, multi_vector, max_length, batch_tokens, role, multi_vector_dtype)
        return encode_texts(self, texts, options, progress=progress)

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        multi_vector: bool = True,
        max_length: int = 8192,
        batch_tokens: int | None = None,
        window_characters: int | None = None,
        progress: bool = False,
        total: int | None = None,
        role: Role = "passage",
        multi_vector_dtype: torch.dtype = torch.float32,
    ) -> Iterator[EncodedTexts]:
        """The representations of any number of texts in bounded memory.

        Args:
            texts: strings, read as they are needed.
            window_characters: texts that are grouped by length among themselves; a window ends with the text that
                fills it. Two windows are in memory at a time. Default 2**18 on a CPU, 2**21 on a GPU.
            total: number of texts, if it is known, for the progress bar.
            dense, sparse, multi_vector, max_length, batch_tokens, progress, role, multi_vector_dtype: as `encode`.

        Returns:
            An iterator over the embeddings of consecutive texts, a window at a time: the first holds those of the first
            len(first) texts, and so on. No text, no window.

        Raises:
            TypeError, ValueError: as `encode`, and window_characters below 1; a text that is no string when it is read.
        """
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be an iterable of strings, got {type(texts).__name__}")
        if window_characters is None:
            window_characters = DEFAULT_WINDOW_CHARACTERS[self.device.type]
        if not isinstance(window_characters, int) or isinstance(window_characters, bool) or window_characters < 1:
            raise ValueError(f"window_characters is {window_characters!r}; accepted: a whole number of at least 1")
        options = EncodingOptions(dense, sparse, multi_vector, max_length, batch_tokens, role, multi_vector_dtype)
        read = windows(checked_strings(texts), window_characters, str)
        return encode_windows(self, read, options, progress=progress, total=total)

    def score(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        *,
        weights: Sequence[float] = DEFAULT_WEIGHTS,
        pairs: Sequence[tuple[int, int]] | None = None,
        max_length: int = 8192,
        batch_tokens: int | None = None,
    ) -> dict[str, Tensor]:
        """The five scores of every query with every passage, or of pairs of them (see m3model.scoring).

        Args:
            queries, passages: texts.
            weights: of dense, sparse and multi-vector in the sums.
            pairs: (query, passage) numbers; every text is encoded once, however often it occurs.

        Returns:
            "dense", "sparse", "multi_vector", "dense+sparse", "all": float32 [Nq, Np], or [P] with pairs, on the CPU.

        Raises:
            TypeError, ValueError: as `encode` and `m3model.scoring.combine`; also pairs out of range.
        """
        check_weights(weights)
        listed = None if pairs is None else torch.as_tensor(pairs, dtype=torch.int32).reshape(-1, 2)
        encoded_queries = self.encode(queries, role="query", max_length=max_length, batch_tokens=batch_tokens)
        encoded_passages = self.encode(passages, max_length=max_length, batch_tokens=batch_tokens)
        return score_embeddings(encoded_queries, encoded_passages, weights=weights, pairs=listed)

    def _check_tokens(self, token_ids: Tensor, offsets: Tensor) -> None:
        check_tensor("token_ids", token_ids, dims=1, dtypes=(torch.int32,))
        if token_ids.device != self.device:
            raise ValueError(f"token_ids is on {token_ids.device}, but the model is on {self.device}")
        check_offsets("offsets", offsets, self.device)
        if torch.compiler.is_compiling() or token_ids.device.type != "cpu":
            return
        check_offset_values("offsets", offsets, token_ids.shape[0])
        if offsets.shape[0] > 1:
            lengths = offsets.diff()
            if int(lengths.min()) < 1:
                raise ValueError(f"text {int(lengths.argmin())} has no token; accepted: at least one, the first is cls")
            if int(lengths.max()) > self.max_length:
                raise ValueError(
                    f"text {int(lengths.argmax())} has {int(lengths.max())} tokens; the model serves {self.max_length}"
                )
            low, high = int(token_ids.min()), int(token_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token_ids run from {low} to {high}; the vocabulary has 0 to {self.config.vocab_size - 1}"
                )
