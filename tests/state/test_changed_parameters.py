"""Parameters whose data, form or gradient somebody changes after a step, in one process."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toys
from conda_dist import Conda
from conda_dist.numerics import arithmetic

SHAPE = (100, 64)
Change = Callable[[nn.Parameter], None]


def _stepped(algorithm: str) -> tuple[Conda, nn.Parameter, nn.Parameter]:
    """An optimizer after a step, the parameter to change, and another one before it."""
    other, param = toys.parameters((8, 4), SHAPE)
    optimizer = Conda([{"params": [("q", other), ("e", param)], "algorithm": algorithm}])
    toys.take(optimizer, [other, param], toys.gradients([other, param], 1))
    param.grad = None
    return optimizer, other, param


def _data(change: Callable[[Tensor], Tensor]) -> Change:
    def apply(param: nn.Parameter) -> None:
        param.data = change(param.data)

    return apply


def _old_gradient(param: nn.Parameter) -> None:
    param.grad = torch.ones(SHAPE)
    param.data = torch.ones(400, 64)


def _other_gradient(param: nn.Parameter) -> None:
    param.grad = torch.ones(SHAPE)
    param.grad.data = torch.ones(400, 64)


def _to_meta(param: nn.Parameter) -> None:
    torch.utils.swap_tensors(param, nn.Parameter(param.detach().to("meta")))


REFUSED: dict[str, tuple[Change, str]] = {
    "larger": (_data(lambda d: torch.ones(400, 64)), r"\(400, 64\).*\(100, 64\)"),
    "smaller": (_data(lambda d: d[:10].clone()), r"\(10, 64\).*\(100, 64\)"),
    "empty": (_data(lambda d: d[:0]), r"\(0, 64\).*\(100, 64\)"),
    "transposed": (_data(lambda d: d.t().contiguous()), r"\(64, 100\).*\(100, 64\)"),
    "flat": (_data(lambda d: d.flatten()), r"\(6400,\)"),
    "folded": (_data(lambda d: d.view(10, 10, 64)), r"\(10, 10, 64\).*\(100, 64\)"),
    "expanded": (_data(lambda d: d[:1].expand(SHAPE)), r"share memory"),
    "double": (_data(lambda d: d.double()), r"torch.float64.*torch.float32"),
    "complex": (_data(lambda d: d.to(torch.complex64)), r"got torch.complex64"),
    "meta": (_to_meta, r"on cpu, but the parameter is on meta"),
    "old gradient": (_old_gradient, r"\(400, 64\).*\(100, 64\)"),
    "other gradient": (_other_gradient, r"gradient has shape \(400, 64\).*\(100, 64\)"),
}


@pytest.mark.parametrize("algorithm", ["conda", "adamw"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_parameter_of_another_form_is_refused(what: str, algorithm: str) -> None:
    """By name, with what was found, and before any parameter is touched."""
    change, said = REFUSED[what]
    optimizer, other, param = _stepped(algorithm)
    change(param)
    if param.grad is None:
        param.grad = torch.ones_like(param)
    before = other.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match=f"^e: .*{said}"):
        optimizer.step()
    assert torch.equal(other, before)
    assert optimizer.state[other]["step"] == 1


@pytest.mark.parametrize("algorithm", ["conda", "adamw"])
def test_dropping_the_state_lets_a_resized_parameter_begin_anew(algorithm: str) -> None:
    optimizer, other, param = _stepped(algorithm)
    (fresh,) = toys.parameters((400, 64))
    param.data = fresh.detach().clone()
    del optimizer.state[param]
    grads = toys.gradients([fresh], 3)
    other.grad = None
    toys.take(optimizer, [param], grads)
    group = {"params": [("e", fresh)], "algorithm": algorithm}
    toys.take(Conda([group]), [fresh], grads)
    assert torch.equal(param, fresh)


@pytest.mark.parametrize("algorithm", ["conda", "adamw"])
def test_strides_may_change(algorithm: str) -> None:
    """As module.to(memory_format=...) changes them, of the parameter, its gradient or both."""
    (param,) = toys.parameters((12, 8))
    (twin,) = toys.copies([param])
    ours, theirs = (Conda([{"params": [p], "algorithm": algorithm}]) for p in (param, twin))
    for step, (grad,) in enumerate(toys.gradients([param], 4)):
        if step == 1:
            param.data = param.data.t().contiguous().t()
        if step == 3:
            param.data = param.data.contiguous()
        param.grad = grad.t().contiguous().t() if step > 1 else grad.clone()
        twin.grad = grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["conda", "adamw"])
def test_halved_parameters_go_on_with_their_float32_state(algorithm: str) -> None:
    """model.bfloat16() after a step is the optimizer of bfloat16 weights, resumed."""
    optimizer, other, param = _stepped(algorithm)
    for each in (other, param):
        each.data, each.grad = each.data.bfloat16(), None
    twins = toys.copies([other, param])
    group = {"params": [("q", twins[0]), ("e", twins[1])], "algorithm": algorithm}
    resumed = Conda([group])
    resumed.load_state_dict(optimizer.state_dict())
    grads = toys.gradients(twins, 3)
    toys.take(optimizer, [other, param], grads)
    toys.take(resumed, twins, grads)
    assert toys.same([other, param], twins)


@pytest.mark.parametrize("algorithm", ["conda", "adamw"])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    "change",
    [lambda s: s[:10].clone(), lambda s: s[:1].clone(), lambda s: s.to("meta")],
    ids=["smaller", "one row", "meta"],
)
def test_no_kernel_gets_moments_of_another_form(
    change: Callable[[Tensor], Tensor], key: str, algorithm: str
) -> None:
    optimizer, _, param = _stepped(algorithm)
    optimizer.state[param][key] = change(optimizer.state[param][key])
    before, param.grad = param.detach().clone(), torch.ones(SHAPE)
    with pytest.raises(ValueError, match=f"^e: its {key}"):
        optimizer.step()
    assert torch.equal(param, before)


def test_what_the_fused_kernel_takes() -> None:
    whole = torch.ones(4, 3)
    assert arithmetic.can_fuse(whole, whole.clone())
    for other in (whole[:2], whole.double(), whole.t(), whole.to("meta"), torch.ones(3, 4).t()):
        assert not arithmetic.can_fuse(whole, other)
        assert not arithmetic.can_fuse(other, whole)


def test_a_steady_step_plans_nothing() -> None:
    optimizer, other, param = _stepped("conda")
    setup = optimizer._setup
    toys.take(optimizer, [other, param], toys.gradients([other, param], 2))
    assert optimizer._setup is setup


def test_tied_again_after_a_step() -> None:
    """The head's own weight has no gradient any more, and stays as it is."""
    model = toys.Block()
    optimizer = Conda(model.named_parameters())
    toys.loss(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model.lm_head.weight.detach().clone()
    old, model.lm_head.weight = model.lm_head.weight, model.embed.weight
    toys.loss(model, 1).backward()
    optimizer.step()
    assert torch.equal(old, before)
    assert optimizer.state[model.embed.weight]["step"] == 2


def test_a_partition_in_the_place_of_a_group() -> None:
    """As the engine of DeepSpeed replaces the parameters of an optimizer it does not know."""
    for groups in (1, 2):
        model = toys.Block()
        optimizer = Conda(model.named_parameters())
        for group in optimizer.param_groups[:groups]:
            flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
            flat.grad, group["params"] = torch.ones_like(flat), [flat]
        for group in optimizer.param_groups[groups:]:
            group["params"] = []
        with pytest.raises(ValueError, match="where the optimizer was given a matrix") as caught:
            optimizer.step()
        for way in ('"type": "Conda"', "integrations.deepspeed.Conda(", "fully_shard"):
            assert way in str(caught.value)


def test_lists_may_be_filtered_and_extended() -> None:
    """What remains of a list of matrices and vectors is no partition."""
    model = toys.Block()
    optimizer = Conda(model.named_parameters())
    later = nn.Parameter(torch.ones(3))
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if p.ndim > 1 or p is model.norm.weight]
        if group["params"] and "param_names" in group:
            names = {id(p): n for n, p in model.named_parameters()}
            group["param_names"] = [names[id(p)] for p in group["params"]]
    toys.loss(model, 0).backward()
    optimizer.step()
    optimizer.add_param_group({"params": [("later.bias", later)], "algorithm": "adamw"})
    later.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(later, torch.ones(3))


def _changed(optimizer: Conda, change: str, new: nn.Parameter) -> None:
    """Changes lists of parameters in place, names left alone."""
    first, second = (group["params"] for group in optimizer.param_groups)
    if change == "append":
        second.append(new)
    elif change == "insert":
        first.insert(0, new)
    elif change == "filter":
        first[:] = [p for p in first if p.ndim > 1]
    elif change == "reverse":
        first.reverse()
    elif change == "move":
        second.append(first.pop(0))
    elif change == "replace":
        optimizer.param_groups[0]["params"] = first[::2]


def _step(optimizer: Conda, index: int) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            torch.manual_seed(index)
            param.grad = torch.randn_like(param)
    optimizer.step()


@pytest.mark.parametrize("used", [0, 2])
@pytest.mark.parametrize("change", ["append", "insert", "filter", "reverse", "move", "replace"])
def test_lists_changed_in_place(change: str, used: int) -> None:
    """Names follow their parameters; the optimizer reports, saves and resumes them as they are."""
    runs = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = toys.Block()
        new = nn.Parameter(torch.ones(3, 5))
        pairs = list(model.named_parameters())
        optimizer = Conda([{"params": pairs[:4]}, {"params": pairs[4:]}], update_proj_gap=2)
        names = {id(param): name for name, param in pairs}

        for index in range(used):
            _step(optimizer, index)
        _changed(optimizer, change, new)
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        for param in [p for p in optimizer.state if not any(p is kept for kept in listed)]:
            del optimizer.state[param]
        for index in range(used, 5):
            if resumed and index == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            _step(optimizer, index)
        runs.append([p.detach() for p in listed])
        called = [name for group in optimizer.param_groups for name in group["param_names"]]
        for name, param in zip(called, listed, strict=True):
            assert name == names.get(id(param), name)
            assert (param is new) == name.startswith("param_groups[")
        assert {row["name"] for row in optimizer.report(show=False)} == set(called)
    assert all(map(torch.equal, *runs))


def test_state_of_a_parameter_taken_out() -> None:
    model = toys.Block()
    optimizer = Conda(model.named_parameters())
    toys.loss(model, 0).backward()
    optimizer.step()
    removed = optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match="state of 1 parameters that were taken out"):
        optimizer.state_dict()
    optimizer.state.pop(removed)
    optimizer.load_state_dict(optimizer.state_dict())
