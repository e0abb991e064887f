"""The check on one GPU; see tests/gpu.sh, which runs it: python check.py OUT [section,...]"""

import importlib
import json
import shutil
import sys
import time
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import BUDGET_S, TOY, Check, Section, left_s

CHECKS = (
    Check("card", "correctness.card"),
    Check("golden", "correctness.golden", 15),
    Check("waits", "correctness.waits"),
    Check("drift", "correctness.drift"),
    Check("one rank", "shards.one_rank", 20),
    Check("many ranks", "shards.many_ranks", 30),
    Check("steps", "speed.steps", 20),
    Check("refreshes", "speed.refreshes", 20),
    Check("train", "training.train", 10 if TOY else 90),
)


def markdown(found: list[Section]) -> str:
    """The table."""
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    where = "CPU, toy sizes: a rehearsal" if TOY else torch.cuda.get_device_name(0)
    lines = [f"# Check of {day} on {where}, torch {torch.__version__}", ""]
    lines += ["| section | what | found | bound | |", "|---|---|---|---|---|"]
    for section in found:
        for row in section.rows:
            said = str(row.found).strip().replace("|", "\\|").replace("\n", "<br>")
            what = row.what.replace("|", "\\|")
            ok = {True: "ok", False: "**wrong**", None: ""}[row.ok]
            lines.append(f"| {section.name} | {what} | {said} | {row.bound} | {ok} |")
    seconds = ", ".join(f"{section.name} {section.seconds:.0f}" for section in found)
    return "\n".join([*lines, "", f"Seconds: {seconds}.", ""])


def _run(check: Check, found: list[Section], out: Path) -> Section:
    section, began = Section(check.name), time.monotonic()
    rates = next((s.details for s in found if s.name == "card"), {})
    section.details["copy GB/s"] = rates.get("copy")
    if left_s() < check.least_s:
        section.add("left out", f"{left_s():.0f} s were left", "", False)
        return section
    module, _, function = check.run.partition(".")
    try:
        getattr(importlib.import_module(module), function)(section, out)
    except Exception:
        section.add("raised", traceback.format_exc()[-1500:], "", False)
    section.seconds = time.monotonic() - began
    if not TOY:
        torch.cuda.empty_cache()
    return section


def main(out: Path, wanted: list[str]) -> int:
    """Runs the sections, writing after each; returns 1 if something is wrong."""
    out.mkdir(parents=True, exist_ok=True)
    checks = [check for check in CHECKS if not wanted or check.name in wanted]
    if unknown := set(wanted) - {check.name for check in CHECKS}:
        print(f"no such sections: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if TOY:
        torch.set_num_threads(1)
    trains = any(check.name == "train" for check in checks)
    making = importlib.import_module("training").prepare(out) if trains else None
    found: list[Section] = []
    for check in checks:
        if check.name == "train" and making is not None:
            making.wait()
        found.append(_run(check, found, out))
        print(markdown(found[-1:]).partition("|---|---|---|---|---|\n")[2], flush=True)
        said = {"toy": TOY, "budget_s": BUDGET_S, "sections": [s.as_dict() for s in found]}
        (out / "check.json").write_text(json.dumps(said, indent=1, default=str))
        (out / "check.md").write_text(markdown(found))
    shutil.rmtree(out / "work", ignore_errors=True)
    return int(any(row.ok is False for section in found for row in section.rows))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else []
    raise SystemExit(main(Path(sys.argv[1]), names))
