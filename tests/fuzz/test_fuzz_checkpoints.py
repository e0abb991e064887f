"""Any state dict and any checkpoint: loaded, or refused by all ranks with nothing changed."""

import copy
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import launch_jobs
import models
import ranks
from conda_dist.launch.cluster import process_group
from conda_dist.launch.cluster.process_group import JobError
from conda_dist.launch.data.preparation import open_data
from conda_dist.launch.job import options
from conda_dist.launch.job.checkpoint import Checkpoints
from conda_dist.launch.job.run import build_engine
from damage import newest
from fuzz import examples
from launch_jobs import succeed
from models import FSDP2, PLAIN, Layout

# State dicts

Spoil = tuple[int, str]
"""Which of a state dict's entries, and what becomes of it."""


def _grown(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros(*value.shape, 2)
    return [*value, 1] if isinstance(value, list | tuple) else {"more": value}


SPOILS: dict[str, Callable[[Any], Any]] = {
    "none": lambda _: None,
    "text": lambda _: "text",
    "number": lambda _: -1.5,
    "nan": lambda _: float("nan"),
    "list": lambda _: [1, 2],
    "dict": lambda _: {"a": 1},
    "bytes": lambda _: b"\x00",
    "scalar": lambda _: torch.tensor(1.0),
    "empty": lambda _: torch.empty(0),
    "grown": _grown,
    "transposed": lambda v: v.mT if isinstance(v, torch.Tensor) and v.ndim > 1 else [v],
    "integers": lambda v: torch.ones(v.shape).int() if isinstance(v, torch.Tensor) else 7,
    "complex": lambda v: torch.ones(v.shape) * 1j if isinstance(v, torch.Tensor) else 1j,
    "sparse": lambda v: torch.ones(v.shape).to_sparse() if isinstance(v, torch.Tensor) else (),
    "meta": lambda v: torch.ones(v.shape, device="meta") if isinstance(v, torch.Tensor) else set(),
    "float64": lambda v: torch.ones(v.shape).double() if isinstance(v, torch.Tensor) else True,
}


def _entries(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every place in a state dict: what holds it, its key, and the way there."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key, f"{path}/{key}"
        if isinstance(tree[key], dict | list):
            yield from _entries(tree[key], f"{path}/{key}")


def _spoil(given_state: dict[str, Any], spoil: Spoil) -> tuple[dict[str, Any], str]:
    """A copy of a state dict with one entry gone, added or something else; and which."""
    spoilt = _copied(given_state)
    places = list(_entries(spoilt))
    holder, key, path = places[spoil[0] % len(places)]
    match spoil[1]:
        case "gone":
            del holder[key]
        case "added" if isinstance(holder, dict):
            holder["added"] = holder[key]
        case "added":
            holder.append(holder[key])
        case kind:
            holder[key] = SPOILS[kind](holder[key])
    return spoilt, path


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _groups(optimizer: Any) -> str:
    return str([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])


def _loads(layout: Layout, spoils: list[Spoil]) -> list[tuple[str, str]]:
    """What loading each spoilt state dict says, and what is wrong with how it ended."""
    model, optimizer = models.build(layout)
    models.train(model, optimizer, range(2))
    good = copy.deepcopy(optimizer.state_dict())
    before, groups = models.snapshot(model, optimizer), _groups(optimizer)
    answers = []
    for spoil in spoils:
        spoilt, path = _spoil(good, spoil)
        said, wrong = models.attempt(optimizer.load_state_dict, spoilt), ""
        if said != "nothing was raised":
            if not said.startswith(("ValueError", "TypeError")):
                wrong = f"{path} {spoil[1]}: {said}"
            elif _groups(optimizer) != groups or models.unequal(
                models.snapshot(model, optimizer), before
            ):
                wrong = f"{path} {spoil[1]}: refused, but changed"
        else:
            # What was taken has to be good for a step.
            trained = models.attempt(models.train, model, optimizer, [2])
            if trained != "nothing was raised":
                wrong = f"{path} {spoil[1]}: taken, and then {trained}"
            elif any(not t.isfinite().all() for t in models.snapshot(model, optimizer).values()):
                wrong = f"{path} {spoil[1]}: taken, and then not finite"
            model, optimizer = models.build(layout)
            models.train(model, optimizer, range(2))
        answers.append((said, wrong))
    return answers


SPOIL = st.tuples(st.integers(0, 10**6), st.sampled_from(["gone", "added", *SPOILS]))


@given(st.lists(SPOIL, min_size=4, max_size=4))
@examples(20)
def test_any_state_dict(spoils: list[Spoil]) -> None:
    assert not [wrong for _, wrong in _loads(PLAIN, spoils) if wrong]


@given(st.lists(SPOIL, min_size=20, max_size=20))
@examples(1, share=0.02)
def test_any_state_dict_on_ranks(spoils: list[Spoil]) -> None:
    answers = ranks.run(2, _loads, FSDP2, spoils, timeout=90)
    assert not [wrong for answer in answers for _, wrong in answer if wrong]
    assert answers[0] == answers[1]


FOUND = [
    ("/param_groups/0/eps", "gone", "it has no eps"),
    ("/param_groups/0/update_proj_gap", "none", "update_proj_gap"),
    ("/param_groups/1/betas", "number", "betas"),
    ("/param_groups/1/lr", "text", "lr must be a number"),
    ("/param_groups/1/weight_decay", "nan", "weight_decay"),
    ("/param_groups/0", "scalar", "parameter group 0 is no dict"),
    ("/param_groups/0/param_names", "bytes", "param_names"),
    ("/param_groups/0/params", "none", "list of 'params'"),
    ("/state", "list", "'state' is no dict"),
    ("/state/0", "empty", "state of parameter 0 is no dict"),
    ("/state/0/step", "number", "step is [-1.5]"),
    ("/state/0/step", "nan", "step is [nan]"),
    ("/state/0/exp_avg", "complex", "exp_avg is of torch.complex64"),
    ("/state/0/exp_avg_sq", "sparse", "exp_avg_sq is torch.sparse_coo"),
    ("/state/0/basis", "meta", "basis is torch.strided on meta"),
]
"""Taken without a word, to fail at the next step, or errors of our own making."""


@pytest.mark.parametrize(("path", "kind", "words"), FOUND, ids=lambda found: found)
def test_state_dicts_that_were_found(path: str, kind: str, words: str) -> None:
    model, optimizer = models.build(PLAIN)
    models.train(model, optimizer, range(1))
    paths = [where for _, _, where in _entries(_copied(optimizer.state_dict()))]
    (answer,) = _loads(PLAIN, [(paths.index(path), kind)])
    assert answer[1] == ""
    assert words.replace("[", "").replace("]", "") in answer[0].replace("[", "").replace("]", "")


# The pretraining job's folders


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("fuzzed"))


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A run of 3 steps on 2 ranks."""
    output = config.parent / "finished"
    succeed(2, config, "--output", output, "--training.steps", 3, "--checkpoint.interval", 0)
    return output


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """Its checkpoint, in a copy of the run."""
    return newest(Path(shutil.copytree(finished, tmp_path / "run")))


def _damage(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut off, left out, or taken from another file."""
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice([1, 8, 300]))
    match draw.choice(["flip", "cut", "out", "splice", "text"]):
        case "flip":
            spoilt = bytes(b ^ (1 << draw.randrange(8)) for b in content[start:stop])
            return content[:start] + spoilt + content[stop:]
        case "cut":
            return content[:start]
        case "out":
            return content[:start] + content[stop:]
        case "splice":
            return content[:start] + other[start:stop][::-1] + content[stop:]
    return content[:start] + b"text" + content[stop:]


def _damages(config: Path, run: Path, seeds: list[int]) -> list[tuple[str, str]]:
    """What loading each damaged copy of a checkpoint says."""
    world = process_group.join(60)
    settings = options.load(config, ["--output", str(run), "--training.steps", "3"])
    engine = build_engine(settings, open_data(settings, world).vocab_size, world)
    checkpoints = Checkpoints(run / "checkpoints", 1, world)
    good = newest(run)
    path = run.parent / "damaged" / "step-00000009"
    names = sorted(file.name for file in good.iterdir())
    answers = []
    for seed in seeds:
        draw = random.Random(seed)
        name, other = draw.choice(names), (good / draw.choice(names)).read_bytes()
        spoilt = _damage((good / name).read_bytes(), other, draw)

        def damage(name: str = name, spoilt: bytes = spoilt) -> None:
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(good, path)
            (path / name).write_bytes(spoilt)

        process_group.from_main(world, "damaging", damage)
        try:
            checkpoints.read_facts(path)
            engine.load(path, 3)
            said = ""
        except JobError as error:
            said = str(error)
        silent = spoilt == (good / name).read_bytes()
        answers.append((f"{name}, seed {seed}", said or ("as it was" if silent else "")))
    return answers


@given(st.lists(st.integers(0, 10**9), min_size=25, max_size=25, unique=True))
@examples(1, share=0.02)
def test_any_damage_to_a_checkpoint(config: Path, finished: Path, seeds: list[int]) -> None:
    """Seen by its hashes."""
    ours, theirs = ranks.run(2, _damages, config, finished, seeds, timeout=90)
    assert ours == theirs
    for case, said in ours:
        assert said, case
