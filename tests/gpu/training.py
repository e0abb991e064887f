"""The section that trains: LLaMA 60M by the clock, on source text that every machine has."""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from common import TOY, Section, end_with_parent, left_s

ROOT = Path(__file__).parents[2]
TEXT = (
    sysconfig.get_path("stdlib") + "/[a-b]*.py"
    if TOY
    else sysconfig.get_path("purelib") + "/t*/**/*.py"
)
"""torch, transformers, triton and others: some 60 MB of Python."""
SIZES = {
    "tokenizer.sample_mb": "0.1" if TOY else "20",
    "training.sequence_length": "32" if TOY else "256",
    "training.global_batch_size": "4" if TOY else "128",
    "training.micro_batch_size": "4" if TOY else "128",
    "training.val_sequences": "4" if TOY else "512",
    **(
        {
            "data.val_fraction": "0.3",
            "model.hidden_size": "24",
            "model.intermediate_size": "48",
            "model.num_hidden_layers": "1",
        }
        | {"model.num_attention_heads": "2", "tokenizer.vocab_size": "300"}
        if TOY
        else {}
    ),
}
RUNS = {
    "adamw": {"optimizer.adamw.lr": "1e-3"},
    "muon": {"optimizer.muon.lr": "4e-3"},
    "conda": {
        "optimizer.conda.lr": "1e-2",
        "optimizer.conda.update_proj_gap": "2" if TOY else "20",
        "optimizer.conda.refresh_method": "orthogonal_iteration",
        "optimizer.conda.matmul_dtype": "bfloat16",
    },
}


def arguments(out: Path, options: dict[str, str]) -> list[str]:
    """The command line of the job: the config, and what differs from it."""
    config = ROOT / "configs" / ("llama_tiny.toml" if TOY else "llama_60m.toml")
    given = {
        "data.hf": "",
        "data.path": os.environ.get("CONDA_TEXT", TEXT),
        "data.cache": str(out / "work" / "cache"),
        "checkpoint.interval": "0",
        "metrics.tensorboard": "false",
        **SIZES,
        **options,
    }
    return [str(config), *(f"--{name}={value}" for name, value in given.items())]


PREPARE = """
import sys
from conda_dist.launch.data import preparation
from conda_dist.launch.job import options
preparation._prepare(options.load(sys.argv[1], sys.argv[2:]))
"""


def prepare(out: Path) -> subprocess.Popen[bytes]:
    """Starts to make tokens, on the CPU's cores, while the other sections run."""
    (out / "work").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", PREPARE, *arguments(out, {})]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1" if TOY else "8"}
    said = (out / "work" / "data.log").open("w")
    return subprocess.Popen(
        command, stdout=said, stderr=said, env=environment, preexec_fn=end_with_parent
    )


def _pretrain(out: Path, name: str, optimizer: str, steps: int, interval: int) -> dict[str, Any]:
    folder = out / "work" / name
    options = {
        "output": str(folder),
        "optimizer.name": optimizer,
        "training.steps": str(steps),
        "training.val_interval": str(interval),
        **RUNS[optimizer],
    }
    command = [sys.executable, "-m", "conda_dist.launch.pretrain", *arguments(out, options)]
    limit = max(10.0, left_s())
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, preexec_fn=end_with_parent
        )
        rc, said = run.returncode, run.stdout + run.stderr
    except subprocess.TimeoutExpired:
        rc, said = 124, f"not done within {limit:.0f} s"
    metrics = folder / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    return {"rc": rc, "said": said[-1500:] if rc else "", "lines": lines}


def train(section: Section, out: Path) -> None:
    """Loss by the clock of AdamW, Muon and Conda, equally many steps each."""
    names, steps = list(RUNS), 4
    if TOY:
        names = ["conda"]
    else:
        probe = _pretrain(out, "probe", "adamw", 30, 30)
        if probe["rc"]:
            section.add("probe", probe["said"], "", False)
            return
        step_s = statistics.median(line["step_s"] for line in probe["lines"][10:])
        for_each = (left_s() - 10) / len(names) - 20  # seconds: it starts and compiles, too
        steps = int(max(20, min(5000, for_each / (1.25 * step_s))))
    for name in names:
        found = _pretrain(out, name, name, steps, max(steps // 10, 1))
        lines = found.pop("lines")
        if found["rc"] or not lines:
            section.add(name, found["said"] or "no steps", "", False)
            continue
        validated = [line for line in lines if line["val_loss"]]
        section.details[name] = [
            (line["step"], line["train_s"], line["val_loss"]) for line in validated
        ]
        last = validated[-1]
        tokens = statistics.median(line["tokens_per_s"] for line in lines)
        section.add(
            f"{name}, {steps} steps",
            f"validation loss {last['val_loss']:.4f} after {last['train_s']:.0f} s of training, "
            f"{tokens:,.0f} tokens/s",
        )
