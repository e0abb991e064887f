"""What the person at the terminal sees: notes, and a live bar while training."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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
        self._steps, self._interval, self._val = steps, interval, ""
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[status]}  ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        """To be entered while training."""
        self._task = self.bar.add_task("", total=steps, completed=done, status="")

    def note(self, message: str) -> None:
        """Prints a line (above the bar, if there is one)."""
        try:
            self._console.print(message, markup=False, soft_wrap=True)
        except OSError:  # what a terminal says that was closed
            self._console.on_broken_pipe()

    def update(self, record: Record) -> None:
        """Shows a record: in the bar, or as a line if one is due."""
        step, validated = record.step, record.val_loss is not None
        if validated:
            self._val = f"  val {record.val_loss:.3f}"
        status = (
            f"loss {record.loss:.3f}{self._val}  {record.tokens_per_s:,.0f} tok/s  "
            f"opt {record.optimizer_s / record.step_s:.0%}"
        )
        self.bar.update(self._task, completed=step, status=status)
        due = step % self._interval == 0 or validated or step in (1, self._steps)
        if due and not self._console.is_terminal:
            left = timedelta(seconds=round((self._steps - step) * record.step_s))
            self.note(f"step {step}/{self._steps}  {status}  ETA {left}")
