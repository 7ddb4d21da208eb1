"""Untrained token weights that mean something: the sparse head is fitted to inverse document frequencies.

The head gives a token the weight relu(w · h + b) of its hidden state h. Here w and b are the ridge regression of

    target(t) = SCALE · (√idf(t) − √log 2)
    idf(t)    = log(1 + (N − df(t) + ½) / (df(t) + ½))        (as in BM25, Robertson 2009)

on the hidden states of the tokens of a sample of texts, df counted in the whole collection. A token that half of the
texts hold weighs nothing; the rarer one is, the more it adds where query and document share it. The head knows rare
from common also in words and languages that the collection does not hold, because the hidden state tells. Training
starts from there or from the constant head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from m3model.encoding import filled_batches, pack_ids
from m3model.model import M3Model
from m3model.tokenizer import Ids

__all__ = ["fit_token_weights"]

SCALE = 0.1
"""Brings sparse scores to the size of the cosines that they are added to."""
RIDGE = 1e-3
"""Relative to the mean squared hidden value."""


def fit_token_weights(
    model: M3Model, collection: Sequence[Ids], sample: Sequence[Ids], batch_tokens: int = 4096
) -> None:
    """Set the sparse head of `model`.

    Args:
        collection: token ids of each document, for document frequencies.
        sample: token ids of texts, of documents and queries, whose hidden states the head is fitted to.
    """
    idf = _inverse_document_frequencies(collection, model.config.vocab_size)
    width = model.config.hidden_size
    gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    moment = torch.zeros(width + 1, dtype=torch.float64)
    for batch in filled_batches(range(len(sample)), [len(text) for text in sample], batch_tokens):
        ids, offsets = pack_ids([sample[number] for number in batch])
        with torch.no_grad():
            hidden = model.backbone(ids.to(model.device), offsets.to(model.device)).double().cpu()
        counted = ~torch.isin(ids, torch.tensor(model.config.ignored_token_ids, dtype=torch.int32))
        rows = torch.cat([hidden[counted], torch.ones(int(counted.sum()), 1, dtype=torch.float64)], dim=1)
        gram += rows.T @ rows
        moment += rows.T @ (SCALE * (idf[ids[counted].long()].sqrt() - math.sqrt(math.log(2))))
    ridge = RIDGE * gram.diagonal()[:-1].mean() * torch.ones(width + 1, dtype=torch.float64)
    ridge[-1] = 0.0
    solution = torch.linalg.solve(gram + torch.diag(ridge), moment)
    with torch.no_grad():
        model.sparse_linear.weight.copy_(solution[None, :-1])
        model.sparse_linear.bias.copy_(solution[-1:])


def _inverse_document_frequencies(collection: Sequence[Ids], vocabulary: int) -> torch.Tensor:
    frequency = np.zeros(vocabulary, dtype=np.int64)
    for ids in collection:
        frequency[np.unique(ids)] += 1
    documents = len(collection)
    return torch.from_numpy(np.log1p((documents - frequency + 0.5) / (frequency + 0.5)))
