"""Runs inside the environment of the official FlagEmbedding: its training loss and gradients on a model folder.

    python training_oracle.py REQUEST.json RESULT.npz

REQUEST: {"folder", "queries": [token ids, ...], "passages": [token ids, ...], "temperature",
"cases": {name: {"self_distill", "unified", "kd_loss_type"?, "teacher_scores"?}}}.
RESULT: "NAME loss", and "NAME gradient PARAMETER" in the names of transformers' encoder and of the two heads.
"""

import json
import sys

import numpy as np
import torch
from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
from FlagEmbedding.finetune.embedder.encoder_only.m3.runner import EncoderOnlyEmbedderM3Runner
from transformers import AutoTokenizer


def padded(texts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def main(request_path: str, result_path: str) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    arrays = {}
    for name, case in request["cases"].items():
        parts = EncoderOnlyEmbedderM3Runner.get_model(request["folder"], torch_dtype=torch.float32)
        model = EncoderOnlyEmbedderM3Model(
            parts,
            tokenizer=tokenizer,
            temperature=request["temperature"],
            kd_loss_type=case.get("kd_loss_type", "kl_div"),
            normalize_embeddings=True,
            unified_finetuning=case["unified"],
            use_self_distill=case["self_distill"],
        )
        model.train()
        model.model.eval()  # no dropout
        sides = (padded(request[side], tokenizer.pad_token_id) for side in ("queries", "passages"))
        loss = model(*sides, teacher_scores=case.get("teacher_scores")).loss
        loss.backward()
        arrays[f"{name} loss"] = np.array(loss.item(), dtype=np.float64)
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                arrays[f"{name} gradient {parameter_name}"] = parameter.grad.numpy()
    np.savez(result_path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
