"""The check on one GPU, bash tests/gpu.sh, rehearsed on the CPU at toy sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import forked

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "gpu.sh"
SECTIONS = (
    *("card", "golden", "waits", "drift", "one rank", "many ranks"),
    *("steps", "refreshes", "train"),
)


def _check(out: Path, *sections: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(SCRIPT), str(out), *sections]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_the_whole_check_runs_at_toy_sizes(tmp_path: Path) -> None:
    """In half a minute on an idle machine; on a GPU this is what is run, on larger matrices."""
    ran = _check(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["toy"]
    assert tuple(section["name"] for section in found["sections"]) == SECTIONS
    rows = [row for section in found["sections"] for row in section["rows"]]
    assert len(rows) > 50
    assert not [row for row in rows if row["ok"] is False]
    assert len([row for row in rows if row["ok"]]) > 15
    table = (tmp_path / "check.md").read_text()
    assert all(f"| {name} | " in table for name in SECTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.json", "check.md"]


@pytest.mark.parametrize("tolerance", ["1e-9", "1e-4"])
def test_what_is_out_of_bounds_is_said(tmp_path: Path, tolerance: str) -> None:
    """Held against a bound that float32 cannot meet, the check must fail."""
    script = tmp_path / "narrow.py"
    script.write_text(
        "import sys, pathlib, golden\n"
        f"golden.TOLERANCE = {tolerance}\n"
        "import check\n"
        f"sys.exit(check.main(pathlib.Path({str(tmp_path)!r}), ['golden']))"
    )
    environment = {"PYTHONPATH": str(TESTS / "gpu"), "CUDA_VISIBLE_DEVICES": ""}
    with forked(script, **environment) as ran:
        said, _ = ran.communicate(120)
    wrong = "**wrong**" in (tmp_path / "check.md").read_text()
    assert (ran.returncode, wrong) == ((1, True) if tolerance == "1e-9" else (0, False)), said


def test_an_unknown_section(tmp_path: Path) -> None:
    ran = _check(tmp_path, "card,graphs")
    assert ran.returncode == 2
    assert "no such sections: graphs" in ran.stderr
