"""What a run writes into its output folder, and how its processes end."""

import os
from pathlib import Path

CONFIG = "config.toml"
"""The resolved configuration."""
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
LOSS_PICTURE, SIGNALS_PICTURE = "loss.png", "signals.png"
SUMMARY = "summary.json"
"""Written when a run is complete: its last step, validation loss and seconds of training, the bytes
of the optimizer's state on all ranks, and a hash of the data."""
DIVERGED = "diverged.json"
"""Written when a run ended because of too many bad steps in a row: the reason."""

EXIT_FAILED, EXIT_CONFIG = 1, 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: not finished, worth starting again."""

STOP_NOTE = "CONDA_DIST_STOP_NOTE"
"""Variable that names a file to make when the job has stopped as asked, for scripts such as
`slurm.sh`: launchers exit with codes of their own."""


def write_whole(file: Path, text: str) -> None:
    """Writes a file so that a reader finds all of it or what was there before."""
    fresh = file.with_name(f"{file.name}.tmp")
    fresh.write_text(text)
    os.replace(fresh, file)
