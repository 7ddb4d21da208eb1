"""The progress bar of m3 train: loss of each head, tokens per second and time left on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
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


class _Bar(Progress):
    """A bar with a line of losses below it: beside it they would take a terminal of 80 columns for themselves."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["losses"])


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
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = _Bar(*columns, console=console)
        self._bar.start()
        done = state.global_step
        self._task = self._bar.add_task("train", total=state.max_steps, completed=done, losses="", speed="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_rest: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        losses = ", ".join(f"{short} {logs[name]:.3f}" for name, short in _SHORT.items() if name in logs)
        speed = f"{logs['tokens_per_second']:.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, losses=losses, speed=speed)
        else:
            message(f"step {state.global_step} of {state.max_steps}: {losses}, {speed}")

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
