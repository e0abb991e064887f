"""Pretraining jobs for the tests: a micro model on a little of the standard library's source."""

import contextlib
import io
import json
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import ranks
from conda_dist.launch import pretrain
from conda_dist.launch.job.files import LOSS_PICTURE
from conda_dist.launch.tools.search import Run

LIBRARY = Path(sysconfig.get_path("stdlib"))

MICRO = """
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2

[tokenizer]
vocab_size = 400

[data]
path = [{paths}]
val_fraction = 0.2
cache = "{cache}"

[training]
steps = 8
sequence_length = 32
global_batch_size = 8
micro_batch_size = 4
val_interval = 4
val_sequences = 16
compute_dtype = "float32"

[optimizer.conda]
lr = 1e-2
update_proj_gap = 3

[optimizer.adamw]
lr = 1e-2

[optimizer.muon]
lr = 1e-2

[optimizer.soap]
precondition_frequency = 2

[checkpoint]
interval = 4

[metrics]
tensorboard = false
"""


class Result(NamedTuple):
    """How one rank's job ended."""

    code: int
    out: str
    err: str


def write_config(folder: Path, *paths: Path) -> Path:
    """A micro config on those texts (some of the standard library by default)."""
    chosen = paths or (LIBRARY / "json", LIBRARY / "email")
    listed = ", ".join(json.dumps(str(path)) for path in chosen)
    file = folder / "micro.toml"
    file.write_text(MICRO.format(paths=listed, cache=folder / "cache"))
    return file


def job(*arguments: str) -> Result:
    """Runs a job in this process, with its output captured; as `drawn`, but without pictures.

    They take a quarter of such a job's time.
    """
    from conda_dist.launch.job import report

    loss = mock.patch.object(report, "draw_loss", lambda folder, _: folder / LOSS_PICTURE)
    with loss, mock.patch.object(report, "draw_signals", return_value=None):
        return drawn(*arguments)


def drawn(*arguments: str) -> Result:
    """Runs a job in this process, with its output captured."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = pretrain.main(arguments)
    return Result(code, out.getvalue(), err.getvalue())


def train(world: int, *arguments: Any) -> list[Result]:
    """Runs a job on real processes and returns how it ended on each rank."""
    return ranks.run(world, job, *map(str, arguments))


def succeed(world: int, *arguments: Any) -> str:
    """Runs a job that must complete; returns what rank 0 printed."""
    results = train(world, *arguments)
    assert [result.code for result in results] == [0] * world, results
    return results[0].out


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """What must repeat exactly in a run: everything but times."""
    keys = ("step", "loss", "lr", "grad_norm", "val_loss", "tokens")
    return [tuple(line[key] for key in keys) for line in metrics(folder)]


def record(run: Run, loss: float | None, **others: Any) -> dict[str, Any]:
    """What a comparison keeps of a finished run; a loss of None: it diverged."""
    rule, matrices, rest, seed, steps = run.rule, run.matrices, run.rest, run.seed, run.steps
    about = {"rule": rule, "matrices": matrices, "rest": rest, "seed": seed, "steps": steps}
    measures = {"step_s": 0.5, "optimizer_s": 0.1, "state_bytes": 2**21, "session": 0, "data": "x"}
    curve = [] if loss is None else [[300, loss + 1.0], [steps, loss]]
    return {**about, "val_loss": loss, **measures, "curve": curve, **others}
