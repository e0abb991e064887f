"""A folder of derived files, each entry made once, by one job at a time.

An entry is a directory whose marker is written last, so a reader sees all of it or nothing,
whatever is killed when.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conda_dist.launch.job.files import write_whole

_MARKER, _LOCK = "entry.json", "lock"


def cache_root(configured: str) -> Path:
    """The cache folder: as configured, else under XDG_CACHE_HOME, else ~/.cache/conda_dist."""
    if configured:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "conda_dist"


def digest(*facts: Any) -> str:
    """A short hash of JSON-able facts, the name of the entry that depends on them."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def read_entry(entry: Path) -> dict[str, Any] | None:
    """The facts its builder recorded, or None unless every file is there at its recorded size."""
    try:
        record = json.loads((entry / _MARKER).read_text())
        sizes = {name: (entry / name).stat().st_size for name in record["sizes"]}
    except (OSError, ValueError, KeyError):
        return None
    return dict(record["facts"]) if sizes == record["sizes"] else None


def build_entry(entry: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Returns the facts of a complete entry, building it first if there is none.

    Says in one line that it waits where another job builds the entry. An entry that is damaged is
    made anew, not written over: jobs that have its files mapped keep what they have.

    Args:
        entry: The directory the entry will be.
        build: Writes files into a directory and returns JSON-able facts about them.
    """
    if (facts := read_entry(entry)) is not None:
        return facts
    entry.mkdir(parents=True, exist_ok=True)
    lock = FileLock(entry / _LOCK, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        said = f"waiting for another job, which holds {entry / _LOCK} and prepares the same data"
        print(said, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        if (facts := read_entry(entry)) is not None:  # another job has built it meanwhile
            return facts
        _clear(entry)  # of what is damaged, or left by a job that was killed
        try:
            facts = build(entry)
        except BaseException:
            _clear(entry)  # the disk may be full
            raise
        sizes = {file.name: file.stat().st_size for file in _content(entry)}
        write_whole(entry / _MARKER, json.dumps({"facts": facts, "sizes": sizes}))
    finally:
        lock.release()
    return facts


def _clear(entry: Path) -> None:
    (entry / _MARKER).unlink(missing_ok=True)  # first: what has a marker is complete
    for file in _content(entry):
        file.unlink()


def _content(entry: Path) -> list[Path]:
    # NFS keeps an unlinked file that is open as a hidden one until it is closed.
    return [f for f in entry.iterdir() if f.name != _LOCK and not f.name.startswith(".")]
