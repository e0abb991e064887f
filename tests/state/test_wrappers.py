"""What wrappers keep in an optimizer's state and groups: kept, saved and restored as it is."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import models
import ranks
import toys
from conda_dist import Conda
from models import FSDP2, GAP, PLAIN, Layout

SAVED, LAST = GAP + 2, 2 * GAP + 2
SLOW = "lookahead_slow_buff"


class Lookahead:
    """Slow weights beside the optimizer's own state, its counts in the groups: as in timm."""

    def __init__(self, base: Any, every: int = 2) -> None:
        self.base, self.every = base, every
        for group in base.param_groups:
            group.setdefault("lookahead_step", 0)

    @property
    def state(self) -> Any:
        return self.base.state

    def zero_grad(self) -> None:
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.base.step()
        for group in self.base.param_groups:
            group["lookahead_step"] += 1
            for param in group["params"] if group["lookahead_step"] % self.every == 0 else ():
                state = self.base.state[param]
                if SLOW not in state:
                    state[SLOW] = param.detach().clone()
                state[SLOW].add_(param - state[SLOW], alpha=0.5)
                param.copy_(state[SLOW])


def _trained(layout: Layout, steps: int = SAVED, **options: Any) -> tuple[Any, Any]:
    model, optimizer = models.build(layout, **options)
    models.train(model, Lookahead(optimizer), range(steps))  # type: ignore[arg-type]
    return model, optimizer


def _go_on(model: Any, optimizer: Any) -> dict[str, Tensor]:
    models.train(model, Lookahead(optimizer), range(SAVED, LAST))  # type: ignore[arg-type]
    taken: dict[str, Tensor] = models.snapshot(model, optimizer)
    return taken


def _filed(given: Any) -> Any:
    file = io.BytesIO()
    torch.save(given, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _resumed(way: str, folder: Path) -> list[str]:
    """Saves, loads and goes on; what differs from the run that never stopped."""
    model, optimizer = _trained(FSDP2)
    # torch's distributed loader reads what the optimizer has a place for, as with AdamW.
    resumed, loaded = _trained(FSDP2, 2 if "dcp" in way or "full" in way else 0, seed=1)
    if way == "dcp":
        models.save(folder, model, optimizer)
        models.load(folder, resumed, loaded)
    else:
        resumed.load_state_dict(model.state_dict())
    if way == "plain":
        loaded.load_state_dict(_filed(optimizer.state_dict()))
    elif "full" in way:
        flat = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict="flat" in way)
        given = get_optimizer_state_dict(model, optimizer, options=flat)
        whole = StateDictOptions(full_state_dict=True)  # torch cannot flatten when it loads so
        set_optimizer_state_dict(resumed, loaded, given, options=whole)
    elif way == "whole":  # plain tensors by number, as one process saves them
        given = optimizer.state_dict()
        state = {i: {k: models.whole(v) for k, v in s.items()} for i, s in given["state"].items()}
        models.train(resumed, Lookahead(loaded), range(2))  # type: ignore[arg-type]
        resumed.load_state_dict(model.state_dict())
        loaded.load_state_dict({**given, "state": state})
    problems = [f"{way}: {name}" for name in models.unequal(*map(_bits, (optimizer, loaded)))]
    if not all(isinstance(s[SLOW], DTensor) for s in loaded.state.values()):
        problems.append(f"{way}: slow weights are not laid out as they were")
    ours, theirs = _go_on(model, optimizer), _go_on(resumed, loaded)
    return problems + [f"{way}: {name}" for name in models.unequal(ours, theirs)]


def _bits(optimizer: Any) -> dict[str, Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{i}:{key}": models.local(value)
        for i, param in enumerate(params)
        for key, value in optimizer.state[param].items()
    }


@pytest.mark.parametrize("way", ["plain", "whole", "dcp", "full", "full, flat"])
def test_lookahead_resumes_on_shards(way: str, tmp_path: Path) -> None:
    for problems in ranks.run(2, _resumed, way, tmp_path, timeout=60):
        assert not problems


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_have_it_too(copied: Callable[[Any], Any]) -> None:
    pair = _trained(PLAIN)
    twins = copied(pair)
    ended = _go_on(*pair)
    assert any(SLOW in name for name in ended)
    assert not models.unequal(ended, _go_on(*twins))


def _others(param: Tensor) -> dict[Any, Any]:
    """States of every kind; one is named like a basis, and one key is no string."""
    return {
        "ema": torch.full(param.shape, 1 / 3, dtype=torch.float64),
        "basis_of_a_wrapper": torch.arange(3),
        "count": torch.tensor(3),
        "label": "slow",
        "nested": {"mask": torch.tensor([True, False]), "history": [1, torch.ones(2)]},
        "nothing": None,
        7: torch.ones(1, dtype=torch.bfloat16),
    }


def _as_text(value: Any) -> str:
    return f"{value!r} {getattr(value, 'dtype', '')}"


@pytest.mark.parametrize("before", [True, False], ids=["before the first step", "later"])
def test_any_state_is_kept(before: bool) -> None:
    params, twins = (toys.parameters(dtype=torch.bfloat16) for _ in range(2))
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 6)
    if not before:
        toys.take(optimizer, params, grads[:2])
    given = [_others(param) for param in params]
    for param, others in zip(params, given, strict=True):
        optimizer.state[param].update(others)
    optimizer.state["a wrapper"] = {"k": 5}  # type: ignore[index]
    optimizer.state["its step"] = 7  # type: ignore[index]
    toys.take(optimizer, params, grads[0 if before else 2 : 4])
    saved = optimizer.state_dict()
    loaded = Conda(twins, **toys.OPTIONS)
    loaded.load_state_dict(saved)
    assert loaded.state["a wrapper"] == {"k": 5}  # type: ignore[index]
    assert loaded.state["its step"] == 7  # type: ignore[index]
    for ours, theirs, others in zip(params, twins, given, strict=True):
        for key, value in others.items():
            assert _as_text(loaded.state[theirs][key]) == _as_text(value)
            assert optimizer.state[ours][key] is value
            if isinstance(value, Tensor):  # a copy: what was saved may go on changing
                assert loaded.state[theirs][key] is not value
    with torch.no_grad():
        for ours, theirs in zip(params, twins, strict=True):
            theirs.copy_(ours)
    toys.take(loaded, twins, grads[4:])
    toys.take(optimizer, params, grads[4:])
    assert toys.same(params, twins)
    alone = toys.parameters(dtype=torch.bfloat16)
    toys.take(Conda(alone, **toys.OPTIONS), alone, grads)
    assert toys.same(params, alone)


def test_state_that_only_a_wrapper_has() -> None:
    """Of a frozen parameter, and of all before the first step, which torch's tools then leave."""
    model, optimizer = models.build(PLAIN)
    frozen = model.embed.weight.requires_grad_(False)
    for param in model.parameters():
        optimizer.state[param][SLOW] = param.detach().clone()
    saved = get_optimizer_state_dict(model, optimizer)["state"]
    assert saved["embed.weight"].keys() == {SLOW}
    assert saved["head.weight"].keys() == {SLOW, "step", "exp_avg", "exp_avg_sq"}
    resumed, loaded = models.build(PLAIN, seed=1)
    resumed.embed.weight.requires_grad_(False)
    loaded.load_state_dict(optimizer.state_dict())
    assert not models.unequal(_bits(optimizer), _bits(loaded))
    frozen.requires_grad_(True)
    models.train(model, optimizer, range(GAP))
    twin, other = models.build(PLAIN)
    models.train(twin, other, range(GAP))
    assert toys.same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("steps", [0, SAVED])
def test_loading_forgets_what_a_wrapper_had(steps: int) -> None:
    """As AdamW does: slow weights of before would draw the loaded weights back to them."""
    model, optimizer = models.build(PLAIN)
    models.train(model, optimizer, range(steps))
    _, loaded = _trained(PLAIN)
    loaded.load_state_dict(optimizer.state_dict())
    assert not any(SLOW in state for state in loaded.state.values())
    for ours, theirs in zip(loaded.param_groups, optimizer.param_groups, strict=True):
        assert ours.keys() == theirs.keys()


def test_a_state_of_which_half_is_gone() -> None:
    params = toys.parameters()
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 2)
    toys.take(optimizer, params, grads[:1])
    del optimizer.state[params[0]]["step"]
    with pytest.raises(ValueError, match=r"no step.*del optimizer\.state"):
        toys.take(optimizer, params, grads[1:])
