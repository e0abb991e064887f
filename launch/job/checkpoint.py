"""Checkpoint folders: complete or not there at all, the newest few kept.

A checkpoint is a folder `step-00000300` holding what the engine wrote and `trainer.json` with the
rest of the run's state. It is written under another name and renamed once every rank is done, so
a folder of that name is complete, whatever was killed when.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conda_dist.launch.cluster.process_group import JobError, World, from_main, gather, together
from conda_dist.launch.job.config import ConfigError

_FACTS = "trainer.json"
FACTS = ("step", "train_s", "val_loss", "bad_steps", "fingerprint", "config")
"""What the job saves besides tensors; without one of them it cannot go on."""
_NAME = re.compile(r"step-\d{8,}")
_WRITING = ".writing-"


class CheckpointError(JobError):
    """A checkpoint that cannot be used; the message says why and what can."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        """Looks after `folder`, keeping the `keep` newest checkpoints in it."""
        self._folder, self._keep, self._world = folder, keep, world

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step, the same one on every rank."""
        doing = "looking for checkpoints"
        found = from_main(self._world, doing, lambda: complete_checkpoints(self._folder))
        return found[-1] if found else None

    def save(self, step: int, facts: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Saves the checkpoint of `step` and returns its folder; every rank calls it.

        Args:
            step: Steps taken.
            facts: JSON-able state, equal on every rank.
            write: Writes the rest into the folder it is given; called on every rank.

        Raises:
            JobError: On every rank, if writing failed on any; older checkpoints are intact.
        """
        final = self._folder / f"step-{step:08}"
        writing = self._folder / f"{_WRITING}{final.name}"

        def begin() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(f"{_WRITING}*"):  # of a run killed while saving
                shutil.rmtree(left)
            writing.mkdir()

        def finish() -> None:
            record = {"facts": facts, "files": files}
            _write_durably(writing / _FACTS, {**record, "sha256": record_hash(record)})
            if final.exists():
                _discard(final)
            writing.rename(final)
            _sync_folder(self._folder)
            for old in complete_checkpoints(self._folder)[: -self._keep]:
                _discard(old)

        from_main(self._world, "making the checkpoint's folder", begin)
        write(writing)
        files = self._hashes(writing)
        from_main(self._world, "completing the checkpoint", finish)
        return final

    def abandon_after(self, step: int) -> list[Path]:
        """Sets checkpoints of later steps aside; returns the folders' new names.

        Otherwise they would be the newest ones, to resume from and to keep.
        """

        def rename() -> list[Path]:
            moved = []
            for path in complete_checkpoints(self._folder):
                if step_of(path) > step:
                    aside = path.with_name(f"abandoned-{path.name}")
                    if aside.exists():
                        _discard(aside)
                    moved.append(path.rename(aside))
            return moved

        return from_main(self._world, "setting later checkpoints aside", rename)

    def read_facts(self, path: Path) -> dict[str, Any]:
        """The facts of a checkpoint, after comparing all its files with what was written.

        Raises:
            CheckpointError: On every rank; it names the file at fault.
            ConfigError: On every rank: it is no checkpoint, or one of another version.
        """
        doing = "reading the checkpoint's facts"
        facts, files, problem = from_main(self._world, doing, lambda: _read_record(path / _FACTS))
        shared = sorted(files)[self._world.rank :: self._world.size]
        differences = (_difference(path / name, files[name]) for name in shared)
        found = gather(self._world, problem or next(filter(None, differences), ""))
        if any(found):
            raise self.unusable(path, next(filter(None, found)))
        if lacking := [name for name in FACTS if name not in facts]:
            raise ConfigError(
                f"the checkpoint {path} was written by another version of this job: it does not "
                f"say {', '.join(lacking)}"
            )
        return facts

    def _hashes(self, folder: Path) -> dict[str, str]:
        """Hash of each file below a folder, the work shared out among the ranks."""
        shared: dict[str, str] = {}
        names = from_main(self._world, "listing the checkpoint", lambda: _files(folder))
        with together(self._world, "reading the checkpoint back"):
            for name in names[self._world.rank :: self._world.size]:
                shared[name] = _hash(folder / name)
        return {name: own for part in gather(self._world, shared) for name, own in part.items()}

    def unusable(self, path: Path, problem: str) -> CheckpointError | ConfigError:
        """The error for a checkpoint with that problem, naming the one to use instead."""
        said = f"the checkpoint {path} cannot be used: {problem}"
        if _NAME.fullmatch(path.name) is None:
            said += ". Checkpoints are folders such as RUN/checkpoints/step-00000300"
            return ConfigError(said)
        there = complete_checkpoints(self._folder)
        if older := [other for other in there if step_of(other) < step_of(path)]:
            advice = f"The one before it: continue from there with --resume {older[-1]}"
        else:
            advice = "There is no older one here: start again with another --output"
        return CheckpointError(f"{said}. {advice}")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted((entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def record_hash(record: dict[str, Any]) -> str:
    """Hash of what trainer.json says, whatever the order and spacing."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _read_record(file: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The facts and the fingerprints of the files, or what is wrong."""
    try:
        record = json.loads(file.read_text())
        if record.pop("sha256") == record_hash(record):
            return record["facts"], record["files"], ""
    except OSError as error:
        return {}, {}, f"{file}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # not what was written, as a wrong hash would say, too
    return {}, {}, f"{file} is damaged"


def _hash(file: Path) -> str:
    # torch does not look at the check sums in its own format: a flipped bit would pass unseen.
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _difference(file: Path, written: str | dict[str, Any]) -> str:
    """How a file differs from what was written; "" if it does not."""
    # Older checkpoints hold a file's size next to its hash.
    expected = written["sha256"] if isinstance(written, dict) else written
    try:
        return "" if _hash(file) == expected else f"{file} is damaged"
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file}: {error.strerror}"


def _discard(path: Path) -> None:
    """Deletes a checkpoint so that a kill half-way leaves nothing that looks like one."""
    doomed = path.with_name(f"{_WRITING}{path.name}-deleted")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _write_durably(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
