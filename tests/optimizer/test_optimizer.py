"""Conda in a training loop does what torch.optim.AdamW does there. One process."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

import conda_dist
import toys
from conda_dist import Conda, param_groups

# Learning rates and gradients from outside


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda t: 0.8**t),
        lambda o: CosineAnnealingLR(o, T_max=6),
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=9),  # cycles betas[0] too
    ],
    ids=["lambda", "cosine", "one_cycle"],
)
def test_schedulers(schedule: Callable[[torch.optim.Optimizer], LRScheduler]) -> None:
    """The same values as AdamW gets, and a trajectory as if they were set by hand."""
    grads = toys.gradients(toys.parameters(), 8)
    adamw = torch.optim.AdamW(toys.parameters(), lr=0.02, betas=(0.9, 0.95))
    scheduled, by_hand = toys.parameters(), toys.parameters()
    ours, hand = Conda(scheduled, **toys.OPTIONS), Conda(by_hand, **toys.OPTIONS)
    theirs_at, ours_at = schedule(adamw), schedule(ours)
    for row in grads:
        expected = {key: adamw.param_groups[0][key] for key in ("lr", "betas")}
        for group in ours.param_groups:
            assert {key: group[key] for key in expected} == expected
        for group in hand.param_groups:
            group.update(expected)
        toys.take(ours, scheduled, [row])
        toys.take(hand, by_hand, [row])
        assert toys.same(scheduled, by_hand)
        adamw.step()
        theirs_at.step()
        ours_at.step()
    constant = toys.parameters()
    toys.take(Conda(constant, **toys.OPTIONS), constant, grads)
    assert not toys.same(constant[:1], scheduled[:1])


def test_from_adamw() -> None:
    """The paper's rates for LLaMA, from AdamW's 1e-3, with AdamW's schedule and decay."""
    ours, papers = toys.parameters(dtype=torch.float64), toys.parameters(dtype=torch.float64)
    grads = toys.gradients(ours, 6)
    adamws = Conda(ours, lr=1e-3, weight_decay=0.1, update_proj_gap=3, **conda_dist.from_adamw())
    toys.take(adamws, ours, grads)
    toys.take(Conda(papers, lr=1e-2, weight_decay=0.01, update_proj_gap=3), papers, grads)
    for our, paper in zip(ours, papers, strict=True):
        torch.testing.assert_close(our, paper)
    assert {group["lr"] for group in adamws.param_groups} == {1e-3}


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "one_element"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tensor_learning_rate(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    shapes = (*toys.SHAPES, (2, 4, 3), ())
    ours, theirs = (toys.parameters(*shapes, dtype=dtype) for _ in range(2))
    starts, grads = toys.copies(ours), toys.gradients(ours, 7)
    # A decay of 0.2 % is within bfloat16's rounding, which a tensor and a number meet in turn.
    options = toys.OPTIONS | ({"lr": 0.1, "weight_decay": 0.0} if dtype == torch.bfloat16 else {})
    lr = torch.full(shape, options["lr"], dtype=torch.float64)
    with_tensor = Conda(ours, **{**options, "lr": lr})
    toys.take(with_tensor, ours, grads)
    toys.take(Conda(theirs, **options), theirs, grads)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for a, b, start in zip(ours, theirs, starts, strict=True):
        assert toys.error(a, b, start) < tolerance
    assert with_tensor.param_groups[0]["lr"] is lr


def test_tensor_learning_rate_is_read_at_every_step() -> None:
    ours, theirs = toys.parameters(), toys.parameters()
    grads = toys.gradients(ours, 6)
    tensor = Conda(ours, **{**toys.OPTIONS, "lr": torch.tensor(0.02)})
    number = Conda(theirs, **toys.OPTIONS)
    schedules = [CosineAnnealingLR(optimizer, T_max=6) for optimizer in (tensor, number)]
    for row in grads:
        toys.take(tensor, ours, [row])
        toys.take(number, theirs, [row])
        for schedule in schedules:
            schedule.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_clipping() -> None:
    clipped, by_hand = toys.parameters(), toys.parameters()
    optimizers = Conda(clipped, **toys.OPTIONS), Conda(by_hand, **toys.OPTIONS)
    for t, row in enumerate(toys.gradients(clipped, 6)):
        row = [grad * 2.0**t for grad in row]
        for param, grad in zip(clipped, row, strict=True):
            param.grad = grad.clone()
        norm = nn.utils.clip_grad_norm_(clipped, 3.0)
        optimizers[0].step()
        factor = (3.0 / (norm + 1e-6)).clamp(max=1.0)
        toys.take(optimizers[1], by_hand, [[grad * factor for grad in row]])
    assert toys.same(clipped, by_hand)


def test_gradients_are_left_alone() -> None:
    params = toys.parameters((6, 4), (3, 5), (2, 3, 4), (4,))
    optimizer = Conda(params, **toys.OPTIONS)
    for row in toys.gradients(params, 5):
        toys.take(optimizer, params, [row])
        assert toys.same([p.grad for p in params if p.grad is not None], row)


def test_grad_scaler_skips_an_overflow() -> None:
    """Scaling by a power of two is exact, so the steps taken are those without it, bit for bit."""
    scaled, plain = toys.Block(), toys.Block()
    ours = Conda(param_groups(scaled), **toys.OPTIONS)
    theirs = Conda(param_groups(plain), **toys.OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for t in range(7):
        before = toys.copies(scaled.parameters())
        ours.zero_grad()
        scaler.scale(toys.loss(scaled, t)).backward()
        if overflow := t == 3:
            assert scaled.up.weight.grad is not None
            scaled.up.weight.grad[0, 0] = torch.inf
        scaler.step(ours)
        scaler.update()
        if overflow:
            assert toys.same(before, scaled.parameters())
            assert scaler.get_scale() == 2.0**9
            continue
        theirs.zero_grad()
        toys.loss(plain, t).backward()
        theirs.step()
        assert toys.same(scaled.parameters(), plain.parameters())
    assert {int(state["step"]) for state in ours.state.values()} == {6}


def test_grad_scaler_skips_the_very_first_step() -> None:
    params = toys.parameters()
    optimizer, scaler = Conda(params, **toys.OPTIONS), torch.amp.GradScaler("cpu")
    for param in params:
        param.grad = torch.full_like(param, torch.inf)
    scaler.scale(torch.ones(()))
    before = toys.copies(params)
    scaler.step(optimizer)
    scaler.update()
    assert toys.same(before, params)
    toys.take(optimizer, params, toys.gradients(params, 1))
    assert all(param.isfinite().all() for param in params)


def test_closure() -> None:
    ours, theirs = toys.Block(), toys.Block()
    with_closure = Conda(param_groups(ours), **toys.OPTIONS)
    without = Conda(param_groups(theirs), **toys.OPTIONS)
    for t in range(4):
        calls = []

        def closure(t: int = t, calls: list[float] = calls) -> float:
            assert torch.is_grad_enabled()
            with_closure.zero_grad()
            loss = toys.loss(ours, t)
            loss.backward()
            calls.append(loss.item())
            return calls[-1]

        with torch.no_grad():
            returned = with_closure.step(closure)
        assert calls == [returned]
        without.zero_grad()
        toys.loss(theirs, t).backward()
        assert without.step() is None
        assert toys.same(ours.parameters(), theirs.parameters())


# Groups


@pytest.mark.parametrize("algorithm", ["conda", "adamw"])
@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0.3},
        {"betas": (0.5, 0.8)},
        {"eps": 1e-2},
        {"weight_decay": 0.5},
        {"scale": 2.0},
        {"adamw_scale": 2.0},
        {"update_proj_gap": 2},
        {"correct_bias": False},
        {"nesterov": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_groups_have_their_own_hyperparameters(option: dict[str, Any], algorithm: str) -> None:
    shapes = (5, 3), (4, 4), (3, 6)
    together, apart = toys.parameters(*shapes), toys.parameters(*shapes)
    grads = toys.gradients(together, 6)
    optimizer = Conda(
        [
            {"params": together[:1], "algorithm": algorithm},
            {"params": together[1:], "algorithm": algorithm, **option},
        ],
        **toys.OPTIONS,
    )
    toys.take(optimizer, together, grads)
    alone = Conda([{"params": apart[:1], "algorithm": algorithm}], **toys.OPTIONS)
    toys.take(alone, apart[:1], [row[:1] for row in grads])
    options = {**toys.OPTIONS, **option}
    alone = Conda([{"params": apart[1:], "algorithm": algorithm}], **options)
    toys.take(alone, apart[1:], [row[1:] for row in grads])
    assert toys.same(together, apart)

    defaults = toys.parameters(*shapes)
    toys.take(
        Conda([{"params": defaults, "algorithm": algorithm}], **toys.OPTIONS), defaults, grads
    )
    of_conda = {"scale", "update_proj_gap", "nesterov"}
    inert = option.keys() & {"conda": {"adamw_scale"}, "adamw": of_conda}[algorithm]
    assert toys.same(defaults[1:2], together[1:2]) == bool(inert & option.keys())


def test_parameters_added_later() -> None:
    """Others keep their state, and the new take a trajectory of their own from step 0."""
    first, later = toys.parameters(), toys.parameters((5, 5), (2, 7), (3,))
    alone, later_alone = toys.copies(first), toys.copies(later)
    grads, later_grads = toys.gradients(first, 8), toys.gradients(later, 4, seed=2)
    optimizer = Conda(first, **toys.OPTIONS)
    toys.take(optimizer, first, grads[:4])
    before = {p: {k: (v, v.clone()) for k, v in optimizer.state[p].items()} for p in first}
    optimizer.add_param_group({"params": later, "lr": 0.5})
    for param, state in before.items():
        assert optimizer.state[param].keys() == state.keys()
        for key, (tensor, value) in state.items():
            assert optimizer.state[param][key] is tensor
            assert torch.equal(tensor, value)
    rows = [a + b for a, b in zip(grads[4:], later_grads, strict=True)]
    toys.take(optimizer, first + later, rows)
    toys.take(Conda(alone, **toys.OPTIONS), alone, grads)
    toys.take(Conda(later_alone, **{**toys.OPTIONS, "lr": 0.5}), later_alone, later_grads)
    assert toys.same(first, alone)
    assert toys.same(later, later_alone)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.5]


def test_zero_gradients_count_once_training_has_begun() -> None:
    """Also just after a group was added: the momentum still moves the others."""
    params, twins = toys.parameters(), toys.parameters()
    (later,) = toys.parameters((3, 3))
    optimizer, twin = Conda(params, **toys.OPTIONS), Conda(twins, **toys.OPTIONS)
    rows = [*toys.gradients(params, 2), [torch.zeros_like(param) for param in params]]
    toys.take(optimizer, params, rows[:2])
    optimizer.add_param_group({"params": later})
    later.grad = torch.zeros_like(later)
    toys.take(optimizer, params, rows[2:])
    toys.take(twin, twins, rows)
    assert toys.same(params, twins)
    assert [int(optimizer.state[p]["step"]) for p in (*params, later)] == [3, 3, 3, 0]


def test_a_group_that_is_refused_leaves_no_half_behind() -> None:
    """As with AdamW: a group with an error in it changes nothing."""
    params = toys.parameters()
    optimizer = Conda(params, **toys.OPTIONS)
    (new,) = toys.parameters((4, 4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [new, params[2]]})
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in params]
    optimizer.add_param_group({"params": [new]})


def test_hyperparameters_changed_by_hand() -> None:
    """Also the interval: a basis older than the last multiple of the new one is due."""
    params = toys.parameters((5, 3))
    optimizer, grads = Conda(params, update_proj_gap=100), toys.gradients(params, 7)
    toys.take(optimizer, params, grads[:5])
    assert optimizer.state[params[0]]["basis_step"] == 0
    optimizer.param_groups[0]["update_proj_gap"] = 4
    toys.take(optimizer, params, grads[5:6])
    assert optimizer.state[params[0]]["basis_step"] == 5
    toys.take(optimizer, params, grads[6:])
    assert optimizer.state[params[0]]["basis_step"] == 5


@pytest.mark.parametrize(
    "spoil",
    [
        lambda group: group.update(lr=math.nan),
        lambda group: group["betas"].__setitem__(0, 2.0),
        lambda group: group["lr"].fill_(math.nan),
        lambda group: group.update(scale=-1.0),
    ],
    ids=["lr", "betas_in_place", "lr_in_place", "scale"],
)
def test_wrong_hyperparameters_set_after_steps(spoil: Callable[[dict[str, Any]], Any]) -> None:
    """Also those set in place: the next step refuses them, and changes nothing."""
    params = toys.parameters((5, 3))
    optimizer = Conda(params, **{**toys.OPTIONS, "lr": torch.tensor(0.1)})
    optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    grads = toys.gradients(params, 3)
    toys.take(optimizer, params, grads[:2])
    before = toys.copies(params)
    spoil(optimizer.param_groups[0])
    with pytest.raises(ValueError, match="parameter group 0: "):
        toys.take(optimizer, params, grads[2:])
    assert toys.same(params, before)


def test_group_dicts_replaced_by_hand() -> None:
    """As wrappers that set ``param_groups`` do: what the new dicts say holds."""
    params = toys.parameters()
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 6)
    twins = toys.copies(params)
    twin = Conda(twins, **toys.OPTIONS)
    for t, row in enumerate(grads):
        new = {"lr": 0.01 * (t + 1), "update_proj_gap": 2}
        optimizer.param_groups = [{**group, **new} for group in optimizer.param_groups]
        for group in twin.param_groups:
            group.update(new)
        toys.take(optimizer, params, [row])
        toys.take(twin, twins, [row])
        assert toys.same(params, twins)


# What else torch's optimizers do


def test_hooks() -> None:
    params = toys.parameters()
    optimizer, seen = Conda(params, **toys.OPTIONS), []
    before = toys.copies(params)
    handles = [
        optimizer.register_step_pre_hook(
            lambda o, args, kwargs: seen.append(("pre", toys.same(params, before)))
        ),
        optimizer.register_step_post_hook(
            lambda o, args, kwargs: seen.append(("post", toys.same(params, before)))
        ),
    ]
    toys.take(optimizer, params, toys.gradients(params, 1))
    assert seen == [("pre", True), ("post", False)]
    for handle in handles:
        handle.remove()
    toys.take(optimizer, params, toys.gradients(params, 1))
    assert len(seen) == 2


def test_step_in_backward() -> None:
    """One optimizer for each parameter, stepped from a hook: memory is freed on the way."""
    ours, theirs = toys.Block(), toys.Block()
    chosen = {id(p): g["algorithm"] for g in param_groups(ours) for _, p in g["params"]}
    optimizers = {
        p: Conda([{"params": [p], "algorithm": chosen[id(p)]}], **toys.OPTIONS)
        for p in ours.parameters()
    }

    def hook(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in ours.parameters():
        param.register_post_accumulate_grad_hook(hook)
    twin = Conda(param_groups(theirs), **toys.OPTIONS)
    for t in range(4):
        toys.loss(ours, t).backward()
        twin.zero_grad()
        toys.loss(theirs, t).backward()
        twin.step()
    assert toys.same(ours.parameters(), theirs.parameters())


def test_names_of_a_compiled_model() -> None:
    model = torch.compile(toys.Block())
    assert any(name.startswith("_orig_mod.") for name, _ in model.named_parameters())
    names = dict(toys.Block().named_parameters()).keys()
    expected = {"up.weight", "down.weight"}
    for params in (param_groups(model), model.named_parameters()):
        table = Conda(params).report(show=False)
        assert {row["name"] for row in table} == names
        assert {row["name"] for row in table if row["path"] == "conda"} == expected


def test_tied_parameters_step_once() -> None:
    model = toys.Block()
    model.lm_head.weight = model.embed.weight
    optimizer = Conda(model.named_parameters(), **toys.OPTIONS)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    toys.loss(model, 0).backward()
    assert model.embed.weight.grad is not None
    before, grad = model.embed.weight.detach().clone(), model.embed.weight.grad.clone()
    optimizer.step()
    assert optimizer.state[model.embed.weight]["step"] == 1
    alone = [nn.Parameter(before)]
    toys.take(Conda([{"params": alone, "algorithm": "adamw"}], **toys.OPTIONS), alone, [[grad]])
    assert torch.equal(model.embed.weight, alone[0])


def test_a_changed_weight_is_noticed_by_autograd() -> None:
    """As with every optimizer of torch: a graph from before the step must not be used after."""
    (weight,) = toys.parameters((4, 3))
    loss = (weight @ weight.mT).square().sum()
    optimizer = Conda([weight])
    toys.take(optimizer, [weight], toys.gradients([weight], 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_learns() -> None:
    model = toys.Block()
    optimizer = Conda(param_groups(model), lr=0.03, update_proj_gap=5)
    first = toys.loss(model, 0).item()
    for t in range(60):
        optimizer.zero_grad()
        toys.loss(model, t).backward()
        optimizer.step()
    assert toys.loss(model, 0).item() < 0.1 * first
    assert "Conda" in repr(optimizer)
