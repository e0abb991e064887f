"""The check on one GPU, bash tests/gpu.sh, rehearsed on the CPU at toy sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import DEADLINE, forked

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "gpu.sh"
SECTIONS = (
    *("card", "golden", "waits", "drift", "one rank", "many ranks"),
    *("steps", "refreshes", "train"),
)


def _check(
    out: Path, *sections: str, python: str = sys.executable
) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
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


def _run(code: str, folder: Path) -> tuple[int | None, str]:
    """Runs code in a process that can import the check; its exit code and what it says."""
    script = folder / "script.py"
    script.write_text(code)
    return _forked(script)


def _forked(*command: str | Path) -> tuple[int | None, str]:
    path = os.pathsep.join([str(TESTS / "gpu"), os.environ.get("PYTHONPATH", "")])
    with forked(*command, PYTHONPATH=path, CUDA_VISIBLE_DEVICES="") as process:
        said, _ = process.communicate(timeout=DEADLINE)
        return process.returncode, said


@pytest.mark.parametrize("tolerance", ["1e-9", "1e-4"])
def test_what_is_out_of_bounds_is_said(tmp_path: Path, tolerance: str) -> None:
    """Held against a bound that float32 cannot meet, the check must fail."""
    code, said = _run(
        "import sys, pathlib, golden\n"
        f"golden.TOLERANCE = {tolerance}\n"
        "import check\n"
        f"sys.exit(check.main(pathlib.Path({str(tmp_path)!r}), ['golden']))",
        tmp_path,
    )
    wrong = "**wrong**" in (tmp_path / "check.md").read_text()
    assert (code, wrong) == ((1, True) if tolerance == "1e-9" else (0, False)), said


BROKEN = """
import os, pathlib, subprocess, sys, time
import check
from common import Check

def hangs(section, out):
    child = subprocess.Popen(["sleep", "300"])
    section.add("child", child.pid)
    time.sleep(300)

def dies(section, out):
    section.add("before", "found")
    os._exit(3)

def raises(section, out):
    section.add("before", "found")
    raise ValueError("no")

def works(section, out):
    section.most("after", 1.0, 2.0)

check.CHECKS = (
    Check("hangs", hangs, 0.5), Check("dies", dies, 30), Check("raises", raises, 30),
    Check("works", works, 30), Check("is late", works, 30, 1e9),
)
sys.exit(check.main(pathlib.Path(OUT), []))
"""


def test_a_section_that_hangs_or_dies_costs_no_other(tmp_path: Path) -> None:
    """What each has said before is kept, and nothing that it has started stays behind."""
    code, said = _run(f"OUT = {str(tmp_path)!r}{BROKEN}", tmp_path)
    assert code == 1, said
    found = json.loads((tmp_path / "check.json").read_text())["sections"]
    rows = {section["name"]: [row["what"] for row in section["rows"]] for section in found}
    assert rows == {
        "hangs": ["child", "killed"],
        "dies": ["before", "died"],
        "raises": ["before", "raised"],
        "works": ["after"],
        "is late": ["left out"],
    }
    assert found[1]["rows"][1]["found"] == "exit code 3"
    assert "ValueError: no" in found[2]["rows"][1]["found"]
    status = Path(f"/proc/{found[0]['rows'][0]['found']}/status")
    assert not status.exists() or "(zombie)" in status.read_text()


def test_an_unknown_section(tmp_path: Path) -> None:
    """With an echo for the script's Python, which takes seconds to start."""
    ran = _check(tmp_path, "card,graphs", python="echo")
    _, *command = ran.stdout.split()
    assert command == [str(tmp_path), "card,graphs"]
    code, said = _forked(TESTS / "gpu" / "check.py", *command)
    assert code == 2
    assert "no such sections: graphs" in said
