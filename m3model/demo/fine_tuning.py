"""The demo's training: a few minutes of M3's loss on docstrings that are not searched.

rows       summary -> body of the training pairs, in FOLDER/train a file for each module that fills a batch and one for
           the rest of each package. A batch comes from one file: the bodies of one module are the harder negatives.
           Bodies are cut to lengths drawn evenly on a logarithmic scale: among bodies of one length no head learns that
           a long one has more tokens to meet a query's by chance
loss       all three heads and their hybrid; the other bodies of a batch are negatives. No distillation: these few steps
           are what the paper calls warm-up (section 3.3), and heads that are made alike add less to each other
weights    embeddings and the first eight layers stay, whose forward pass is that of inference: a step is cheap
state      FOLDER/training holds a checkpoint every few steps; a run that was stopped goes on from the last one
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m3model.demo.docstrings import Pair
from m3model.files import write_whole
from m3model.model import M3Model
from m3model.retrieval import fingerprint

__all__ = ["HYBRID_WEIGHTS", "UNTRAINED_WEIGHTS", "Weights", "fine_tuned"]

Weights = tuple[float, float, float]
HYBRID_WEIGHTS: Weights = (0.5, 0.2, 1.0)
"""Of dense, sparse and multi-vector in the hybrid of the trained model, chosen in two folds (docstrings.py)."""
UNTRAINED_WEIGHTS: Weights = (1.0, 0.3, 1.0)
"""Of the model before, likewise."""

_RECIPE: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "dataloader_drop_last": True,  # the rest of a module is a few rows, sometimes one, without negatives
    "group_size": 1,
    "query_max_length": 48,
    "passage_max_length": 512,
    "learning_rate": 1e-4,
    "head_learning_rate": 2e-3,
    "loss_weights": [1.0, 2.0, 1.0],  # the paper's 0.1 for the sparse head suits more steps than minutes allow
    "self_distill": False,
    "frozen_layers": 8,
    "warmup_steps": 0.1,
    "dropout": 0.0,  # hardly a row comes twice
}
_SAVE_STEPS = 10
_LEAST_CHARACTERS = 160
_MOST_CHARACTERS = 1280


def fine_tuned(model: M3Model, pairs: Sequence[Pair], folder: Path, steps: int, seed: int) -> M3Model:
    """`model` trained on `pairs` for `steps` steps, from FOLDER/trained if that is what it holds.

    Args:
        pairs: at least as many as a batch holds.
        folder: of the demo.
    """
    rows = _files(pairs)
    made_of = {
        "steps": steps,
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "start": fingerprint(model),
        "seed": seed,
        **_RECIPE,
    }
    target, work = folder / "trained", folder / "training"
    if (target / "config.json").is_file():
        stored = M3Model.from_pretrained(target)
        if stored.config.others.get("fine_tuned") == made_of:
            return stored
    marker = work / "made_of.json"
    if work.is_dir() and not (marker.is_file() and json.loads(marker.read_text()) == made_of):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    write_whole(marker, json.dumps(made_of))
    data = folder / "train"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    for name, content in rows.items():
        write_whole(data / f"{name}.jsonl", content)
    _train(model, [data / f"{name}.jsonl" for name in rows], work, steps, seed)
    model.config = replace(model.config, others={**model.config.others, "fine_tuned": made_of})
    model.save_pretrained(target)
    shutil.rmtree(work)
    return model.eval()


def _files(pairs: Sequence[Pair]) -> dict[str, str]:
    """The rows of each file by its name, as JSON lines."""
    modules = [".".join(pair.name.split(".")[:2]) for pair in pairs]
    sizes, files = Counter(modules), dict[str, str]()
    for module, pair in sorted(zip(modules, pairs)):
        alone = sizes[module] >= _RECIPE["per_device_train_batch_size"]
        name = module if alone else module.split(".")[0]
        row = json.dumps({"query": pair.summary, "pos": [_beginning(pair)]})
        files[name] = files.get(name, "") + row + "\n"
    return files


def _beginning(pair: Pair) -> str:
    """Of the pair's body, as long as a hash of its name says; at least 200 characters are there (docstrings.py)."""
    drawn = int.from_bytes(hashlib.sha256(pair.name.encode()).digest()[:4], "big") / 2**32
    return pair.body[: round(_LEAST_CHARACTERS * (_MOST_CHARACTERS / _LEAST_CHARACTERS) ** drawn)]


def _train(model: M3Model, files: Sequence[Path], work: Path, steps: int, seed: int) -> None:
    from transformers.trainer_callback import PrinterCallback

    from m3model.cli.train_progress import TrainingBar
    from m3model.training import DataSource, M3Trainer, M3TrainingArguments, TrainingDataset, last_checkpoint

    arguments = M3TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        save_steps=_SAVE_STEPS,
        save_total_limit=1,
        logging_steps=4,
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        seed=seed,
        **_RECIPE,
    )
    bar = TrainingBar()
    trainer = M3Trainer(
        model, arguments, TrainingDataset([DataSource(file, name=file.stem) for file in files]), callbacks=[bar]
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(work))
    finally:
        bar.close()
