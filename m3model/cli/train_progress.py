"""The progress bar of m3 train: loss of each head, tokens per second and time left on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from m3model.cli.output import message, stderr

__all__ = ["TrainingBar"]

_SHORT = {
    "loss": "loss",
    "loss_dense": "dense",
    "loss_sparse": "sparse",
    "loss_multi_vector": "multi",
    "loss_ensemble": "hybrid",
    "loss_distill": "distil",
}


class TrainingBar(TrainerCallback):  # type: ignore[misc]
    """A bar on a terminal, a line for each log elsewhere; only the first process writes."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        console = stderr()
        if not state.is_world_process_zero or not console.is_terminal:
            return
        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console)
        self._bar.start()
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_rest: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        figures = ", ".join(f"{short} {logs[name]:.3f}" for name, short in _SHORT.items() if name in logs)
        figures += f", {logs['tokens_per_second']:.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, figures=figures)
        else:
            message(f"step {state.global_step} of {state.max_steps}: {figures}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_rest: Any) -> None:
        if state.is_world_process_zero:
            values = ", ".join(f"{name.split('_', 2)[2]} {value:.4f}" for name, value in metrics.items() if "@" in name)
            self._write(f"step {state.global_step}: nDCG@10 {values}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal's last line; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False)
        else:
            message(line)
