"""What the commands share: they refuse in one line, with exit code 2, before torch is imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from conda_dist.launch.cluster import launcher
from conda_dist.launch.data.sources import open_source
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.deepspeed_file import read_file
from conda_dist.launch.job.files import EXIT_CONFIG


class Parser(argparse.ArgumentParser):
    """argparse's, whose refusals are one line, as those of the job's keys are."""

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        """The command line of `python -m conda_dist.launch.COMMAND`."""
        super().__init__(
            prog=f"python -m conda_dist.launch.{command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog=epilog,
        )

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and ends the process."""
        raise SystemExit(refuse(message))


def refuse(error: object) -> int:
    """Says in one line what is wrong; returns the exit code."""
    rank, said = launcher.launched_rank(), " ".join(str(error).split())
    print(f"[rank {rank}] error: {said}" if rank else f"error: {said}", file=sys.stderr, flush=True)
    return EXIT_CONFIG


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    number = int(text) if text.isdecimal() and len(text) < 11 else 0
    if not 0 < number < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def count(text: str) -> int:
    """A whole number of 0 or more, for argparse."""
    return 0 if text == "0" else positive(text)


def check_output(output: str | Path) -> None:
    """Refuses an output folder that cannot be one, before anything is made of it.

    Raises:
        ConfigError: It, or what it would be made in, is no folder, or cannot be written.
    """
    try:
        there = Path(output).absolute()
        while not there.exists():
            there = there.parent
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"output {str(output)!r} cannot be a folder: {reason}") from None
    if not there.is_dir():
        raise ConfigError(f"output {output}: {there} is a file, where a folder is wanted")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output {output}: {there} cannot be written: give another --output")


def check_input(config: Config) -> None:
    """Raises ConfigError for names of files that are not there, or cannot be used."""
    if config.data.path:
        open_source(config.data)
    read_file(config)
    file = config.tokenizer.path
    if file and not Path(file).expanduser().is_file():
        raise ConfigError(f"tokenizer.path {file!r} names no file")


PICTURES = ("png", "pdf", "svg")
"""Formats in which the commands draw."""


def check_file(option: str, path: Path, formats: Sequence[str] = PICTURES) -> None:
    """Refuses a file that `option` asks for and that could not be written, before the work."""
    if path.suffix.removeprefix(".") not in formats:
        raise ConfigError(f"{option} {path}: name a file that ends in .{', .'.join(formats)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written")
