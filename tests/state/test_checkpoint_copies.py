"""Hooks, copies and pickles of an optimizer."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import models
import ranks
from models import GAP, PLAIN

SAVED, LAST = GAP + 2, 2 * GAP + 2


def _trained(**options: Any) -> tuple[Any, Any]:
    model, optimizer = models.build(PLAIN, **options)
    models.train(model, optimizer, range(SAVED))
    return model, optimizer


def test_hooks_of_the_user_find_what_torch_promises() -> None:
    _, optimizer = _trained()
    resumed, loaded = models.build(PLAIN)
    seen: list[Any] = []

    def halve(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        state = {k: {**v, "exp_avg": v["exp_avg"] / 2} for k, v in given["state"].items()}
        return {**given, "state": state}

    def look(of: Any) -> None:
        seen.append({k: v.clone() for k, v in of.state[resumed.blocks[0].q.weight].items()})

    loaded.register_load_state_dict_pre_hook(halve)
    handle = loaded.register_load_state_dict_post_hook(look)
    for _ in range(2):  # ours are put in for each load, and must not pile up
        loaded.load_state_dict(optimizer.state_dict())
    saved = next(s for s in optimizer.state.values() if tuple(s["exp_avg"].shape) == (10, 10))
    assert len(seen) == 2
    for state in seen:
        assert torch.equal(state["exp_avg"], saved["exp_avg"] / 2)
        assert torch.equal(state["basis"], saved["basis"])
        assert state["step"] == SAVED

    handle.remove()
    loaded.register_load_state_dict_post_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        loaded.load_state_dict(optimizer.state_dict())
    assert len(loaded._optimizer_load_state_dict_pre_hooks) == 1
    assert len(loaded._optimizer_load_state_dict_post_hooks) == 1


def _fail(_: Any) -> None:
    raise ZeroDivisionError


def test_hooks_of_saving() -> None:
    _, optimizer = _trained()
    optimizer.register_state_dict_post_hook(lambda _, given: {**given, "extra": 1})
    given = optimizer.state_dict()
    assert given["extra"] == 1
    loaded = models.build(PLAIN)[1]
    loaded.load_state_dict(given)
    assert loaded.state_dict().keys() == {"state", "param_groups"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: _pickled(pair)])
def test_copies(copied: Any) -> None:
    """A copy of model and optimizer goes on as they do, and apart from them."""
    model, optimizer = _trained(buffer_bytes=7, matmul_dtype=torch.float64)
    twin, other = copied((model, optimizer))
    assert other._options == optimizer._options
    models.train(model, optimizer, range(SAVED, LAST))
    ended = models.snapshot(model, optimizer)
    models.train(twin, other, range(SAVED, LAST))
    assert not models.unequal(ended, models.snapshot(model, optimizer))
    assert not models.unequal(ended, models.snapshot(twin, other))


def _pickled(pair: Any) -> Any:
    return torch.load(io.BytesIO(_saved(pair)), weights_only=False)


def _saved(pair: Any) -> bytes:
    file = io.BytesIO()
    torch.save(pair, file)
    return file.getvalue()


def test_a_copy_before_the_first_step() -> None:
    model, optimizer = models.build(PLAIN)
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    for with_ in ((model, optimizer), (twin, other)):
        models.train(*with_, range(GAP + 1))
    assert not models.unequal(models.snapshot(model, optimizer), models.snapshot(twin, other))


def _copy_with_a_group() -> tuple[list[str], str]:
    model, optimizer = models.build(("ddp", ()))
    models.train(model, optimizer, range(GAP))
    twin, other = copy.deepcopy((model, optimizer))
    for with_ in ((model, optimizer), (twin, other)):
        models.train(*with_, range(GAP, LAST))
    differing = models.unequal(models.snapshot(model, optimizer), models.snapshot(twin, other))
    return differing, models.attempt(pickle.dumps, optimizer)


def test_a_copy_is_among_the_same_ranks() -> None:
    """A process group is shared by a copy, and named in a pickle."""
    for differing, said in ranks.run(2, _copy_with_a_group, timeout=60):
        assert not differing
        assert said == "nothing was raised"


def test_a_state_dict_taken_by_a_new_first_step() -> None:
    """An empty state dict, saved before any step, leaves nothing of what was there."""
    fresh = models.build(PLAIN)[1].state_dict()
    model, optimizer = _trained()
    optimizer.load_state_dict(fresh)
    assert not any(optimizer.state.values())
    with torch.no_grad():
        for mine, start in zip(
            model.parameters(), models.build(PLAIN)[0].parameters(), strict=True
        ):
            mine.copy_(start)
    models.train(model, optimizer, range(SAVED))
    assert not models.unequal(models.snapshot(model, optimizer), models.snapshot(*_trained()))
