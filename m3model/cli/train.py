"""m3 train: training from a YAML file, every line of which is also an option."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from m3model.files import free_room, write_whole

if TYPE_CHECKING:
    from m3model.training import DataSource, M3Trainer, M3TrainingArguments, TrainingDataset

__all__ = ["train"]

_SUMMARY = """Train a model: m3 train CONFIG.yaml [--option value ...]

CONFIG.yaml holds options without their dashes (learning_rate: 2e-5); options on the command line come after it and
win. Several processes: torchrun --nproc-per-node N -m m3model.cli train CONFIG.yaml. The trained model ends up in
OUTPUT_DIR/model, checkpoints, each of them a model folder too, in OUTPUT_DIR/checkpoint-N."""


@dataclass
class _Run:
    """What to train, beside how."""

    model: str | None = field(default=None, metadata={"help": "Model folder, or hub id such as BAAI/bge-m3."})
    init_heads: bool = field(default=False, metadata={"help": "Make fresh heads for those that the model lacks."})
    train: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Files of rows (JSON lines), each a path or {"path": ..., "name": ..., "weight": 2.0,'
            ' "batch_size": 16}.'
        },
    )
    dev: str | None = field(default=None, metadata={"help": "File of rows to measure nDCG@10 of every head on."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir, if any."})
    json: bool = field(default=False, metadata={"help": "Print the result as JSON instead of a table."})


def train(context: typer.Context) -> None:
    """Train a model on queries with passages that answer them and passages that do not: m3 train CONFIG.yaml."""
    run, args = _parse(context.args)
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from m3model.cli.output import message
    from m3model.cli.train_progress import TrainingBar
    from m3model.model import M3Model
    from m3model.training import M3Trainer, TrainingDataset, last_checkpoint, read_training_rows

    assert run.model is not None and run.train is not None and args.output_dir is not None
    found = last_checkpoint(args.output_dir)
    if found is not None and not run.resume:
        raise FileExistsError(f"{args.output_dir} holds {found}; --resume goes on from it, or name another output_dir")
    dataset = TrainingDataset([_source(text) for text in run.train])
    dev = None if run.dev is None else list(read_training_rows(run.dev))
    set_seed(args.seed)
    model = M3Model.from_pretrained(run.model, init_heads=run.init_heads)
    bar = TrainingBar()
    trainer = M3Trainer(model, args, dataset, dev, callbacks=[bar])
    trainer.remove_callback(PrinterCallback)
    main = trainer.is_world_process_zero()
    if main:
        message(
            f"{len(dataset)} rows of {len(run.train)} file{'s' if len(run.train) > 1 else ''} ({_counts(dataset)})"
            + (f", from {found} on" if found else "")
        )
    begin = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=found)
    finally:
        bar.close()
    _save(trainer, Path(args.output_dir))
    measured = trainer.evaluate() if dev is not None else {}
    if main:
        _write_arguments(run, args)
        _show(run, trainer, measured, time.monotonic() - begin)


def _parse(arguments: Sequence[str]) -> tuple[_Run, M3TrainingArguments]:
    from transformers import HfArgumentParser

    from m3model.training import M3TrainingArguments

    parser: argparse.ArgumentParser = HfArgumentParser(
        (_Run, M3TrainingArguments),
        prog="m3 train",
        usage="m3 train CONFIG.yaml [--option value ...]",
        description=_SUMMARY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    given = list(arguments)
    options = [word.split("=")[0].replace("-", "_") for word in given if word.startswith("--")]
    twice = sorted({option for option in options if options.count(option) > 1})
    if twice:
        parser.error(f"{', '.join('--' + name[2:] for name in twice)} given more than once; all values go behind one")
    if given and not given[0].startswith("-"):
        known = {action.dest for action in parser._actions}
        given = [*_as_options(Path(given[0]), known, parser), *given[1:]]
    try:
        run, args, rest = parser.parse_args_into_dataclasses(  # type: ignore[attr-defined]
            given, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if run.model is None or not run.train:
        parser.error("model and train are needed, in CONFIG.yaml or as --model and --train")
    if args.resume_from_checkpoint is not None:
        parser.error("resume_from_checkpoint is not for m3 train; --resume goes on from the last checkpoint")
    args.disable_tqdm = True
    return run, args


def _as_options(path: Path, known: set[str], parser: argparse.ArgumentParser) -> list[str]:
    """The lines of a YAML file as command line options."""
    import yaml

    if not path.is_file():
        parser.error(f"there is no file {str(path)!r}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _yaml_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path} is no YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path} holds no lines such as learning_rate: 2e-5")
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        parser.error(f"{path}: unknown {', '.join(unknown)}; m3 train --help lists all names")
    options: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            options += [f"--{name}", *map(_as_word, value)]
        else:
            options.append(f"--{name}={_as_word(value)}")  # a value may begin with a dash
    return options


def _yaml_loader() -> Any:
    """PyYAML's safe loader where 1e-6 is a number, as YAML 1.2 has it, and no the word that save_strategy takes."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=deep) for key, _value in node.value]
            for place, name in enumerate(names):
                if name in names[:place]:
                    raise yaml.YAMLError(f"line {node.value[place][0].start_mark.line + 1}: {name} for the second time")
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    truth, number = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, words) for tag, words in known if tag != truth]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(truth, re.compile("(?i:yes|true|false|on|off)$"), list("yYtTfFoO"))
    Loader.add_implicit_resolver(number, re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
    return Loader


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def _source(text: str) -> DataSource:
    """A path, or a JSON object of DataSource's fields."""
    from m3model.training import DataSource

    if not text.startswith("{"):
        return DataSource(text)
    try:
        return DataSource(**json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"train holds {text}; accepted: a path, or path, name, weight and batch_size: {error}"
        ) from error


def _counts(dataset: TrainingDataset) -> str:
    return ", ".join(f"{source.name} {len(dataset.rows_of(place))}" for place, source in enumerate(dataset.sources))


def _save(trainer: M3Trainer, output: Path) -> None:
    """Write the trained model.

    Raises:
        OSError: the disk is full or the folder cannot be written; names the last checkpoint.
    """
    from safetensors import SafetensorError

    from m3model.training import last_checkpoint

    try:
        trainer.save_model(str(output / "model"))
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = last_checkpoint(output)
        rest = "there is no checkpoint" if kept is None else f"--resume writes it anew from {kept}"
        place = f"the trained model cannot be written to {output / 'model'}: {error}"
        raise OSError(f"{place}; {free_room(output)}; {rest}") from error


def _write_arguments(run: _Run, args: M3TrainingArguments) -> None:
    """What was asked for, beside the model."""
    content = {"model": run.model, "train": run.train, "dev": run.dev, **args.to_dict()}
    arguments = json.dumps(content, indent=2, default=str, ensure_ascii=False)
    write_whole(Path(args.output_dir) / "arguments.json", arguments)


def _show(run: _Run, trainer: M3Trainer, measured: Mapping[str, float], seconds: float) -> None:
    from m3model.cli.output import print_json, print_table

    output = str(Path(trainer.args.output_dir) / "model")
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = {name: value for name, value in (losses[-1] if losses else {}).items() if name.startswith("loss")}
    quality = {name.removeprefix("eval_ndcg@10_"): value for name, value in measured.items() if "ndcg" in name}
    if run.json:
        steps = trainer.state.global_step
        print_json({"model": output, "steps": steps, "seconds": round(seconds, 1), "loss": last, "ndcg@10": quality})
        return
    rows = [[name.removeprefix("loss_").replace("loss", "total"), f"{value:.4f}", ""] for name, value in last.items()]
    rows += [[name, "", f"{value:.4f}"] for name, value in quality.items()]
    title = f"{output} after {trainer.state.global_step} steps, {seconds:.0f} s"
    print_table(["", "last loss", "nDCG@10"], rows, title=title, right="last nDCG@10")
