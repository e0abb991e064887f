"""State: which parameters have it and when, and that nothing else touches it. One process."""

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import toys
from conda_dist import Conda, param_groups
from conda_dist.parameter_names import named_parameters, path_of

CONDA_KEYS = {"step", "exp_avg", "exp_avg_sq", "basis", "basis_step"}
ADAMW_KEYS = {"step", "exp_avg", "exp_avg_sq"}


# Parameters that come and go


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    ours, theirs = toys.Block(), toys.Block()
    optimizer = Conda(param_groups(ours), **toys.OPTIONS)
    twin = Conda(param_groups(theirs), **toys.OPTIONS)
    for t in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        grads = [param.grad for param in ours.parameters()]
        if t:
            assert all(g is None if set_to_none else not g.any() for g in grads)
        toys.loss(ours, t).backward()
        optimizer.step()
        for param in theirs.parameters():
            param.grad = None
        toys.loss(theirs, t).backward()
        twin.step()
    assert toys.same(ours.parameters(), theirs.parameters())


def test_frozen_and_unfrozen() -> None:
    """A frozen parameter has no state and stays; unfrozen it starts as if it were new."""
    params = toys.parameters((6, 4), (3, 5), (5, 5), (4,), (3,))
    frozen = [params[1], params[4]]
    alone, grads = toys.copies(params), toys.gradients(params, 6)
    for param in frozen:
        param.requires_grad_(False)
    optimizer, before = Conda(params, **toys.OPTIONS), toys.copies(frozen)
    for row in grads[:3]:
        toys.take(
            optimizer,
            params,
            [[g if p.requires_grad else None for p, g in zip(params, row, strict=True)]],
        )
    assert toys.same(frozen, before)
    assert not any(param in optimizer.state for param in frozen)
    assert len(optimizer.report(show=False)) == 3
    for param in frozen:
        param.requires_grad_(True)
    toys.take(optimizer, params, grads[3:])
    for i, param in enumerate(params):
        rows = grads[3:] if any(param is p for p in frozen) else grads
        algorithm = "conda" if param.ndim > 1 else "adamw"
        twin = Conda([{"params": alone[i : i + 1], "algorithm": algorithm}], **toys.OPTIONS)
        toys.take(twin, alone[i : i + 1], [[row[i]] for row in rows])
        assert torch.equal(param, alone[i])
    assert len(optimizer.report(show=False)) == 5


def test_frozen_on_the_way_keeps_its_state() -> None:
    params = toys.parameters()
    alone, grads = toys.copies(params), toys.gradients(params, 6)
    optimizer = Conda(params, **toys.OPTIONS)
    toys.take(optimizer, params, grads[:2])
    for frozen in (True, False):
        for param in params[:1]:
            param.requires_grad_(not frozen)
        rows = grads[2:4] if frozen else grads[4:]
        toys.take(optimizer, params, [[None if frozen else row[0], *row[1:]] for row in rows])
    twin = Conda(alone, **toys.OPTIONS)
    toys.take(twin, alone, [[None if 2 <= t < 4 else g[0], *g[1:]] for t, g in enumerate(grads)])
    assert toys.same(params, alone)
    assert int(optimizer.state[params[0]]["step"]) == 4


@pytest.mark.parametrize("index", range(3))
def test_missing_gradients_are_not_counted(index: int) -> None:
    """The parameter's own steps decide when its basis is due and how bias is corrected."""
    params = toys.parameters()
    alone, rows = toys.copies(params), toys.gradients(params, 10)
    missing = {0, 3, 4, 8}
    grads: list[list[Tensor | None]] = [
        [None if i == index and t in missing else g for i, g in enumerate(row)]
        for t, row in enumerate(rows)
    ]
    optimizer = Conda(params, **toys.OPTIONS)
    after = toys.take(optimizer, params, grads)
    for t in missing - {0}:
        assert torch.equal(after[t][index], after[t - 1][index])
    assert int(optimizer.state[params[index]]["step"]) == 6
    adamw_params = toys.copies(alone)
    adamw = torch.optim.AdamW(adamw_params)
    toys.take(adamw, adamw_params, grads)
    for ours, theirs in zip(params, adamw_params, strict=True):
        assert optimizer.state[ours]["step"] == adamw.state[theirs]["step"]

    twin = Conda(alone, **toys.OPTIONS)
    mine = [[g if i == index else None for i, g in enumerate(row)] for row in rows]
    toys.take(twin, alone, [row for t, row in enumerate(mine) if t not in missing])
    assert torch.equal(params[index], alone[index])


def test_many_patterns_of_missing_gradients() -> None:
    """More than the schedules that are kept."""
    shapes = [(3, 2)] * 7
    params = toys.parameters(*shapes)
    alone, rows = toys.copies(params), toys.gradients(params, 80)
    grads = [[g if (t + 1) >> i & 1 else None for i, g in enumerate(r)] for t, r in enumerate(rows)]
    toys.take(Conda(params, **toys.OPTIONS), params, grads)
    for i in range(7):
        mine = [[row[i]] for row in grads if row[i] is not None]
        toys.take(Conda(alone[i : i + 1], **toys.OPTIONS), alone[i : i + 1], mine)
    assert toys.same(params, alone)


def test_no_gradients_at_all() -> None:
    params = toys.parameters()
    optimizer, before = Conda(params, **toys.OPTIONS), toys.copies(params)
    optimizer.step()
    assert toys.same(params, before)
    assert not any(state["step"] for state in optimizer.state.values())


def test_a_first_step_of_zeros_does_not_count() -> None:
    """Frameworks take one to create state; AdamW would count it and decay the weights."""
    params, twins = toys.parameters(), toys.parameters()
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 4)
    toys.take(optimizer, params, [[torch.zeros_like(p) for p in params]] * 2)
    assert toys.same(params, twins)
    toys.take(optimizer, params, grads)
    toys.take(Conda(twins, **toys.OPTIONS), twins, grads)
    assert toys.same(params, twins)


def test_a_momentum_that_becomes_zero_has_a_basis_already() -> None:
    """As of an expert that gets no tokens any more: it must not make every step a refresh."""
    (param,) = toys.parameters((2, 6, 4))
    optimizer = Conda(
        [{"params": [param], "algorithm": "conda"}], betas=(0.0, 0.9), update_proj_gap=2
    )
    rows = [grads[0] for grads in toys.gradients([param], 6)]
    for grad in rows[2:]:
        grad[1] = 0.0
    toys.take(optimizer, [param], [[grad] for grad in rows[:2]])
    before = optimizer.state[param]["basis"].clone()
    toys.take(optimizer, [param], [[grad] for grad in rows[2:]])
    basis, taken = (optimizer.state[param][key] for key in ("basis", "basis_step"))
    assert taken.tolist() == [4.0, 4.0]  # the last step that was due, for both
    assert not torch.equal(basis[0], before[0])
    assert torch.equal(basis[1], before[1])


def test_a_weight_whose_first_gradient_is_zero() -> None:
    """As LoRA's A: the SVD of zeros must not become its basis for a whole interval."""
    params, twins = toys.parameters(), toys.parameters()
    rows = toys.gradients(params, 5)
    zero = torch.zeros_like(params[0])
    optimizer = Conda(params, **toys.OPTIONS)
    toys.take(optimizer, params, [[zero, *rows[0][1:]], *rows[1:]])
    toys.take(Conda(twins[:1], **toys.OPTIONS), twins[:1], [row[:1] for row in rows[1:]])
    assert torch.equal(params[0], twins[0])
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 5, 5]


def test_a_parameter_replaced_before_the_first_step() -> None:
    """As Accelerate and fully_shard do: names and groups stay, layouts are resolved later."""
    model = toys.Block()
    optimizer = Conda(param_groups(model), **toys.OPTIONS)
    new = {}
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            new[param] = group["params"][i] = nn.Parameter(param.detach().clone())
    params, twins = list(new.values()), toys.copies(new.values())
    grads = toys.gradients(params, 5)
    toys.take(optimizer, params, grads)
    algorithms = [g["algorithm"] for g in optimizer.param_groups for _ in g["params"]]
    groups = [{"params": [p], "algorithm": a} for p, a in zip(twins, algorithms, strict=True)]
    toys.take(Conda(groups, **toys.OPTIONS), twins, grads)
    assert toys.same(params, twins)
    assert not any(old in optimizer.state for old in new)
    assert {row["name"] for row in optimizer.report(show=False)} == dict(
        model.named_parameters()
    ).keys()


# State


def _has_whole_state(optimizer: Conda) -> bool:
    return all(
        set(optimizer.state[param]) == (CONDA_KEYS if path == "conda" else ADAMW_KEYS)
        for name, param, group in named_parameters(optimizer.param_groups)
        for path in [path_of(name, param, group)]
    )


def test_state_is_allocated_at_once_at_the_first_step() -> None:
    params = toys.parameters((6, 4), (3, 5), (2, 4, 3), (4,), ())
    optimizer = Conda(params, **toys.OPTIONS)
    assert not optimizer.state
    first: list[Tensor | None] = [None] * 5
    first[1] = torch.ones(3, 5)
    toys.take(optimizer, params, [first])
    assert _has_whole_state(optimizer)
    tensors = {p: dict(optimizer.state[p]) for p in params}
    toys.take(optimizer, params, toys.gradients(params, 7))
    assert _has_whole_state(optimizer)
    for param, state in tensors.items():  # updated in place: nothing is allocated again
        assert all(optimizer.state[param][key] is tensor for key, tensor in state.items())


def test_init_state() -> None:
    params, twins = toys.parameters(), toys.parameters()
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 4)
    optimizer.init_state()
    assert _has_whole_state(optimizer)
    tensors = {id(t) for p in params for t in optimizer.state[p].values()}
    optimizer.init_state()
    toys.take(optimizer, params, grads)
    assert tensors == {id(t) for p in params for t in optimizer.state[p].values()}
    toys.take(Conda(twins, **toys.OPTIONS), twins, grads)
    assert toys.same(params, twins)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_report_counts_the_bytes_there_are(
    dtype: torch.dtype, state_dtype: torch.dtype | None, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = (6, 4), (3, 5), (1, 7), (2, 4, 3), (2, 2, 3, 5), (4,), ()
    params = toys.parameters(*shapes, dtype=dtype)
    groups = [{"params": params[:5], "algorithm": "conda"}, {"params": params[5:]}]
    optimizer = Conda(groups, state_dtype=state_dtype)
    promised = optimizer.report(show=False)
    assert capsys.readouterr().out == ""
    toys.take(optimizer, params, toys.gradients(params, 1))
    assert optimizer.report(show=False) == promised
    for param, row in zip(params, promised, strict=True):
        assert row["shape"] == tuple(param.shape)
        assert row["state_bytes"] == sum(t.nbytes for t in optimizer.state[param].values())
        assert row["step_bytes"] == row["refresh_bytes"] == 0
    assert optimizer.report() == promised
    assert "Conda" in capsys.readouterr().out


def test_a_report_leaves_no_trace() -> None:
    """torch's checkpoint tools take an optimizer whose ``state`` is not empty for initialised."""
    model, other = toys.Block(), toys.Block()
    optimizer, twin = Conda(param_groups(model)), Conda(param_groups(other))
    optimizer.report(show=False)
    saved = get_optimizer_state_dict(model, optimizer)["state"]
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert set(saved["up.weight"]) == CONDA_KEYS
    assert set(saved["up.bias"]) == ADAMW_KEYS
    fresh = Conda(param_groups(toys.Block()))
    fresh.report(show=False)
    twin.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize("how", ["clear", "replace"])
def test_state_that_is_thrown_away(how: str) -> None:
    """ReLoRA and others reset an optimizer so: it starts again, and its state is what is saved."""
    params = toys.parameters()
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 7)
    toys.take(optimizer, params, grads[:4])
    if how == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict)
    twins = toys.copies(params)
    toys.take(optimizer, params, grads[4:])
    toys.take(Conda(twins, **toys.OPTIONS), twins, grads[4:])
    assert toys.same(params, twins)
    assert _has_whole_state(optimizer)
    assert {int(optimizer.state[param]["step"]) for param in params} == {3}


@pytest.mark.parametrize("algorithm", ["conda", "adamw"])
def test_state_of_the_other_path(algorithm: str) -> None:
    """The moments of the two are in different coordinates: a group cannot change its path."""
    params = toys.parameters((6, 4))
    optimizer = Conda([{"params": params, "algorithm": algorithm}])
    grads = toys.gradients(params, 2)
    toys.take(optimizer, params, grads[:1])
    optimizer.param_groups[0]["algorithm"] = {"conda": "adamw", "adamw": "conda"}[algorithm]
    with pytest.raises((ValueError, RuntimeError), match="algorithm"):
        toys.take(optimizer, params, grads[1:])


def test_steps_are_counted_exactly_whatever_the_default_dtype() -> None:
    """In bfloat16 256 + 1 is 256; AdamW counts in float32 for this reason."""
    params = toys.parameters((3, 2), (2,))
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 300)
    torch.set_default_dtype(torch.bfloat16)
    try:
        toys.take(optimizer, params, grads)
    finally:
        torch.set_default_dtype(torch.float32)
    for param in params:
        assert optimizer.state[param]["step"] == 300
    assert optimizer.state[params[0]]["basis_step"] == 297


def test_counters_are_on_the_cpu_whatever_the_default_device() -> None:
    """With torch.set_default_device they would land on the GPU, and reading them would wait."""
    params = toys.parameters()
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 4)
    with torch.device("meta"):
        toys.take(optimizer, params, grads)
    assert {t.device.type for p in params for t in optimizer.state[p].values()} == {"cpu"}


def test_copies_and_pickles_go_on() -> None:
    params, grads = toys.parameters(), toys.gradients(toys.parameters(), 8)
    optimizer = Conda(params, matmul_dtype=torch.bfloat16, **toys.OPTIONS)
    toys.take(optimizer, params, grads[:4])
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    toys.take(optimizer, params, grads[4:])
    for other in others:
        theirs = [p for group in other.param_groups for p in group["params"]]
        toys.take(other, theirs, grads[4:])
        assert toys.same(params, theirs)


def test_two_optimizers_share_nothing() -> None:
    ours, theirs = toys.parameters(), toys.parameters((5, 5), (3, 2), (6,))
    alone, theirs_alone = toys.copies(ours), toys.copies(theirs)
    grads, their_grads = toys.gradients(ours, 6), toys.gradients(theirs, 6, seed=2)
    options = {"lr": 0.3, "betas": (0.5, 0.6), "update_proj_gap": 2}
    first, second = Conda(ours, **toys.OPTIONS), Conda(theirs, **options)
    for row, their_row in zip(grads, their_grads, strict=True):
        toys.take(first, ours, [row])
        toys.take(second, theirs, [their_row])
    toys.take(Conda(alone, **toys.OPTIONS), alone, grads)
    toys.take(Conda(theirs_alone, **options), theirs_alone, their_grads)
    assert toys.same(ours, alone)
    assert toys.same(theirs, theirs_alone)


def test_the_same_run_twice_is_the_same() -> None:
    runs = []
    for _ in range(2):
        params = toys.parameters((40, 24), (24, 40), (3, 8, 8), (24,))
        toys.take(Conda(params, **toys.OPTIONS), params, toys.gradients(params, 7))
        runs.append(params)
    assert toys.same(*runs)
