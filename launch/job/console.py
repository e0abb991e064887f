"""What the person at the terminal sees: notes, and a live bar while training."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from conda_dist.launch.job.metrics import Record


class _Console(Console):
    """One whose reader may go away: a launcher that is killed must not cost the steps till then."""

    def on_broken_pipe(self) -> None:
        """Goes on silently, where rich would end the process."""
        self.quiet = True
        # Python itself would still complain when it flushes what is left, at the end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Display:
    """A progress bar on a terminal, a line every so often anywhere else."""

    def __init__(self, steps: int, done: int, interval: int) -> None:
        """Starts at `done` of `steps`; `interval` is the number of steps between plain lines."""
        self._console = _Console(highlight=False)
        self._steps, self._interval = steps, interval
        self._val_loss: float | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[status]}  ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=done, status="")

    def __enter__(self) -> Display:
        """Shows the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the bar's last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def note(self, message: str) -> None:
        """Prints a line (above the bar, if there is one)."""
        try:
            self._console.print(message, markup=False, soft_wrap=True)
        except OSError:  # what a terminal says that was closed
            self._console.on_broken_pipe()

    def update(self, record: Record) -> None:
        """Shows a record: in the bar, or as a line if one is due."""
        if record.val_loss is not None:
            self._val_loss = record.val_loss
        status = _status(record, self._val_loss)
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, status=status)
        elif (
            record.step % self._interval == 0
            or record.val_loss is not None
            or record.step in (1, self._steps)
        ):
            left = _clock((self._steps - record.step) * record.step_s)
            self.note(f"step {record.step}/{self._steps}  {status}  ETA {left}")


def _status(record: Record, val_loss: float | None) -> str:
    val = f"  val {val_loss:.3f}" if val_loss is not None else ""
    return (
        f"loss {record.loss:.3f}{val}  {record.tokens_per_s:,.0f} tok/s  "
        f"opt {record.optimizer_s / record.step_s:.0%}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
