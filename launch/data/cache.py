"""A folder of derived files, each entry made once and safe against concurrent jobs.

An entry is a directory built elsewhere and renamed into place, so a reader sees all of it or
nothing, whatever is killed when.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MARKER = "entry.json"


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

    Args:
        entry: The directory the entry will be.
        build: Fills an empty directory and returns JSON-able facts about it.
    """
    facts = read_entry(entry)
    if facts is not None:
        return facts
    entry.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=entry.parent))
    try:
        facts = build(building)
        sizes = {file.name: file.stat().st_size for file in building.iterdir()}
        (building / _MARKER).write_text(json.dumps({"facts": facts, "sizes": sizes}))
        _move_into_place(building, entry)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return facts


def _move_into_place(building: Path, entry: Path) -> None:
    """Renames; another job that finished the same entry first has made it just as well."""
    try:
        building.rename(entry)
    except OSError:
        if read_entry(entry) is not None:
            return
        # What is there is damaged. Moving it aside is atomic; deleting it in place is not.
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=entry.parent))
        with contextlib.suppress(FileNotFoundError):
            entry.rename(aside / entry.name)
        building.rename(entry)
        shutil.rmtree(aside, ignore_errors=True)
