"""Jobs of 16 ranks, planned by one process: torchtitan's real models on the meta device."""

import io
import math
import os
import re
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torchtitan.config import ConfigManager

from conda_dist.integrations.torchtitan.train import rewrite
from conda_dist.report import print_table
from preloaded import context, process

COMMANDS = Path(__file__).parents[2] / "configs" / "torchtitan"

SHARDED = ["--optimizer.basis_budget", "0"]
JOBS: dict[str, list[str]] = {
    "8B": ["--module", "llama3", "--config", "llama3_8b", *SHARDED],
    "8B with TP": [
        *("--module", "llama3", "--config", "llama3_8b"),
        *("--parallelism.tensor_parallel_degree", "8"),
    ],
    "671B": [
        *("--module", "deepseek_v3", "--config", "deepseek_v3_671b"),
        *("--parallelism.expert_parallel_degree", "16"),
    ],
}


def _plan(jobs: list[tuple[str, int]], answers: Connection) -> None:
    """Plans each job as one of its ranks, in a fork: torchtitan keeps its meshes to the end."""
    from conda_dist.integrations.torchtitan.plan import plan, refresh_flops

    for name, rank in jobs:
        if not (child := os.fork()):
            table = plan(JOBS[name], 16, rank)
            answers.send((table, refresh_flops(table)))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, (name, rank)


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    jobs = [("8B", 0), *(("8B with TP", rank) for rank in (0, 15)), ("671B", 0)]
    ours, theirs = context.Pipe()
    planner = process(_plan, jobs, theirs)
    planner.start()
    theirs.close()
    with ours:
        found = {f"{name} {rank}": ours.recv() for name, rank in jobs}
    planner.join()
    return found


def _is_matrix(row: dict[str, Any]) -> bool:
    return bool(row["path"] == "conda")


def test_owners_are_the_same_on_all_ranks_and_share_the_work(plans: dict[str, Any]) -> None:
    tables = [plans[f"8B with TP {rank}"][0] for rank in (0, 15)]
    owners = [{row["name"]: row["owners"] for row in table} for table in tables]
    assert owners[0] == owners[1]
    for name in JOBS:
        _, work = plans[f"{name} 0"]
        assert sorted(map(int, work)) == list(range(16))
        assert max(work.values()) < 1.4 * sum(work.values()) / 16, name


def test_state_of_sharded_bases_is_a_sixteenth(plans: dict[str, Any]) -> None:
    """All shapes of the 8B model divide by 16: (2 N + sum of r^2) x 4 bytes / 16, and counters."""
    table, _ = plans["8B 0"]
    counters = {row["name"]: 4 + 4 * len(row["owners"]) for row in table}
    elements = sum(2 * math.prod(row["shape"]) for row in table)
    elements += sum(min(row["shape"]) ** 2 for row in table if _is_matrix(row))
    held = sum(row["state_bytes"] - counters[row["name"]] for row in table)
    assert held == elements * 4 // 16


def test_the_table_names_everything(plans: dict[str, Any]) -> None:
    """However many ranks share the work: only the columns beside the name may be cut."""
    table = [
        {**row, "owners": [rank * 7 % 256 for rank in range(len(row["owners"]))]}
        for row in plans["671B 0"][0]
    ]
    printed = io.StringIO()
    print_table(table, Console(file=printed, width=180))
    lines = printed.getvalue().splitlines()
    width = next(line.index("shape") for line in lines if "shape" in line)
    said = "".join(line[:width].strip() for line in lines)
    for name in {re.sub(r"\.\d+\.", ".*.", row["name"]) for row in table}:
        assert name in said.replace(" ", ""), printed.getvalue()


def test_paths(plans: dict[str, Any]) -> None:
    table, _ = plans["671B 0"]
    paths = {row["name"]: row["path"] for row in table}
    assert paths["tok_embeddings.weight"] == paths["lm_head.weight"] == "adamw"
    assert paths["layers.3.moe.router.gate.weight"] == "adamw"
    experts = [row for row in table if ".inner_experts." in row["name"]]
    assert len(experts) == 58 * 3
    assert all(len(row["owners"]) == 256 and _is_matrix(row) for row in experts)
    # Of experts that live on one rank nothing moves, and nothing but that rank refreshes them.
    assert all(row["step_bytes"] == 0 and row["refresh_bytes"] == 0 for row in experts)


@pytest.mark.parametrize("script", sorted(COMMANDS.glob("*_*.sh")), ids=lambda path: path.stem)
def test_ready_commands(script: Path, tmp_path: Path) -> None:
    """With a torchrun that prints its arguments instead, which torchtitan then must accept."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(script), "--training.steps", "7", "--optimizer.lr", "0.02"]
    ended = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=True)
    arguments = ended.stdout.splitlines()
    module = arguments.index("-m")
    assert arguments[module + 1] == "conda_dist.integrations.torchtitan.train"
    config = ConfigManager().parse_args(rewrite(arguments[module + 2 :]))
    assert config.optimizer.name == "conda"
    assert config.optimizer.matmul_dtype == "bfloat16"
    assert config.training.steps == 7
    assert config.optimizer.lr == 0.02
    comment = script.read_text().splitlines()[1]
    ranks = math.prod(int(argument.partition("=")[2]) for argument in arguments[:2])
    assert f"on {ranks} GPUs" in comment
