"""Training steps of FlagEmbedding 1.4.2's own model class, in an environment of its own (make .venv-parity).

    python flag_training.py FOLDER BATCH.npz [--memory GIB]

As benchmarks.peers.training, on the same batch, here padded to the longest text of either side, as FlagEmbedding's
collator does.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
from FlagEmbedding.finetune.embedder.encoder_only.m3.runner import EncoderOnlyEmbedderM3Runner
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from stepping import answer_steps, limit_memory


def padded(ids: np.ndarray, offsets: np.ndarray, pad: int) -> dict[str, torch.Tensor]:
    lengths = np.diff(offsets)
    rows = torch.full((len(lengths), int(lengths.max())), pad, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for number, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        rows[number, : end - begin] = torch.from_numpy(ids[begin:end]).long()
        mask[number, : end - begin] = 1
    return {"input_ids": rows, "attention_mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("batch")
    parser.add_argument("--memory", type=float)
    arguments = parser.parse_args()
    limit_memory(arguments.memory)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    parts = EncoderOnlyEmbedderM3Runner.get_model(arguments.folder, torch_dtype=torch.float32)
    model = EncoderOnlyEmbedderM3Model(
        parts,
        tokenizer=tokenizer,
        temperature=0.02,
        normalize_embeddings=True,
        unified_finetuning=True,
        use_self_distill=True,
    )
    model.train()
    model.model.eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = np.load(arguments.batch)
    sides = [
        padded(batch[f"{side}_ids"], batch[f"{side}_offsets"], tokenizer.pad_token_id) for side in ("query", "passage")
    ]

    def step() -> float:
        loss = model(*sides).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    answer_steps(step)


if __name__ == "__main__":
    main()
