"""What a user can get wrong in constructing the optimizer, and what they are told."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import toys
from conda_dist import Conda


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(toys.random(*shape or (4, 3)))


def _refused(call: Callable[[], object], *words: str) -> None:
    """``call`` raises TypeError or ValueError, in words that include these."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    said = str(caught.value)
    assert all(word in said for word in words), f"{words} not all in: {said}"


# Hyperparameters

BAD: list[tuple[str, Any]] = [
    *((name, value) for name in (
        "lr", "eps", "weight_decay", "scale", "adamw_scale"
    ) for value in (
        "0.1", None, True, [0.1], 1j, -0.1, math.nan, math.inf, -math.inf, np.array([0.1, 0.2])
    )),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor(0.1j)),
    ("eps", torch.tensor(1e-8)),
    *(("betas", value) for value in (
        0.9, "ab", (), (0.9,), (0.9, 0.99, 0.999), (0.9, 1.0), (1.0, 0.9), (-0.1, 0.9),
        (0.9, -0.1), (math.nan, 0.9), (0.9, math.inf), ("0.9", 0.99), (None, 0.9), (True, 0.9),
        {0.9, 0.99},
    )),
    *(("update_proj_gap", value) for value in (0, -1, 1.5, 2000.0, "2000", True, False)),
    *(("correct_bias", value) for value in (1, 0, None, "yes", 0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: str(v)[:20])
def test_hyperparameters(name: str, value: Any) -> None:
    _refused(lambda: Conda([_weight()], **{name: value}), name)


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: str(v)[:20])
def test_hyperparameters_of_a_group(name: str, value: Any) -> None:
    """The message says which group, and an optimizer that refuses one is as it was."""
    groups = [{"params": [_weight()]}, {"params": [_weight()], name: value}]
    _refused(lambda: Conda(groups), "parameter group 1", name)
    optimizer = Conda([_weight()])
    _refused(lambda: optimizer.add_param_group(groups[1]), "parameter group 1", name)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("beta", [0, 0.0, 0.999999])
def test_bounds_that_are_allowed(beta: float) -> None:
    optimizer = Conda(
        [_weight()], lr=0, betas=(beta, beta), eps=0, weight_decay=0, scale=0, update_proj_gap=1
    )
    toys.take(optimizer, *_one_step(optimizer))
    Conda([_weight()], betas=[0.9, 0.95])  # type: ignore[arg-type]
    Conda([_weight()], lr=np.float64(0.1))


@pytest.mark.parametrize("integer", [10**400, -(10**400)], ids=["positive", "negative"])
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "scale", "adamw_scale"])
def test_integers_no_float_can_hold(name: str, integer: int) -> None:
    _refused(lambda: Conda([_weight()], **{name: integer}), name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in (
            "state_dtype", "second_moment_dtype", "matmul_dtype", "basis_dtype")
          for value in (
            "float16", "half", 32, float, torch.int32, torch.bool, torch.complex64
        )),
        *(("basis_budget", value) for value in (-1, 1.5, "1", True)),
        *((name, value) for value in (-1, 1.5, "1", None, True, "async") for name in (
            "buffer_bytes", "refresh_delay", "diagnostics_every",
        )),
        *((name, torch.uint8) for name in ("state_dtype", "matmul_dtype", "basis_dtype")),
        ("second_moment_dtype", torch.float16),
        ("second_moment_dtype", torch.int8),
        ("stochastic_rounding", 1),
        ("stochastic_rounding", True),  # of moments in float32
        ("matmul_dtype", torch.float16),
        ("buffer_bytes", 0),
        *((name, "tf32") for name in ("state_dtype", "second_moment_dtype", "basis_dtype")),
        ("process_group", "world"),
        ("process_group", 5),
    ],
    ids=lambda v: str(v)[:20],
)  # fmt: skip
def test_options(name: str, value: Any) -> None:
    _refused(lambda: Conda([_weight()], **{name: value}), name)


@pytest.mark.parametrize(
    "name", ["state_dtype", "second_moment_dtype", "matmul_dtype", "basis_dtype"]
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dtypes_no_step_could_be_taken_in(name: str, dtype: torch.dtype) -> None:
    """Refused at construction, not by a kernel in the first step."""
    _refused(lambda: Conda([_weight()], **{name: dtype}), name, str(dtype))


# Keys


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("weigth_decay", "weight_decay"),
        ("weight_decays", "weight_decay"),
        ("beta", "betas"),
        ("update_proj_gaps", "update_proj_gap"),
        ("algoritm", "algorithm"),
        ("correct_biases", "correct_bias"),
        ("param_name", "param_names"),
    ],
)
def test_misspelt_group_options(key: str, meant: str) -> None:
    group = {"params": [_weight()], key: 0.1}
    _refused(lambda: Conda([group]), "parameter group 0", repr(key), repr(meant))


@pytest.mark.parametrize("key", ["initial_lr", "max_lr", "lr_scale", "name", "tag", "layer", "wd"])
def test_foreign_group_options_are_kept(key: str) -> None:
    """Users and schedulers keep notes in groups, as torch allows."""
    optimizer = Conda([{"params": [_weight(), _weight(3)], key: 0.1}])
    assert [group[key] for group in optimizer.param_groups] == [0.1]


@pytest.mark.parametrize("key", ["refresh_delay", "buffer_bytes", "matmul_dtype"])
def test_options_of_the_whole_optimizer_are_no_group_s(key: str) -> None:
    group = {"params": [_weight()], key: 1}
    _refused(lambda: Conda([group]), "parameter group 0", key, "give it to Conda(...)")


@pytest.mark.parametrize("value", ["std", "left", None])
def test_the_released_code_s_projection_types_are_unknown(value: Any) -> None:
    """A group would keep the key as a note, and project otherwise than it says."""
    group = {"params": [_weight()], "proj_type": value}
    _refused(lambda: Conda([group]), "parameter group 0", "unknown option 'proj_type'")


@pytest.mark.parametrize("algorithm", ["muon", "Conda", "", 1, ["conda"], True, False])
def test_unknown_algorithm(algorithm: Any) -> None:
    group = {"params": [_weight()], "algorithm": algorithm}
    _refused(lambda: Conda([group]), "parameter group 0", "algorithm", "conda", "adamw")


@pytest.mark.parametrize("key", ["maximize", "capturable", "differentiable", "amsgrad"])
def test_options_of_adamw_that_would_be_ignored(key: str) -> None:
    group = {"params": [_weight()], key: True}
    _refused(lambda: Conda([group]), "parameter group 0", key)
    assert key not in Conda([{**group, key: False}]).param_groups[0]
    with pytest.raises(TypeError, match=key):
        Conda([_weight()], **{key: True})
    Conda([_weight()], **{key: False})


@pytest.mark.parametrize("key", ["foreach", "fused"])
@pytest.mark.parametrize("value", [True, False, None])
def test_options_of_how_adamw_computes_are_dropped(key: str, value: bool | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Conda([{"params": [_weight(), _weight(3)], key: value}])
        assert key not in Conda([_weight()], **{key: value}).param_groups[0]
    assert not any(key in group for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "key", ["fuse", "momentum", "adamw_lr", "proj_type", "refresh", "bucket_bytes"]
)
def test_other_options_are_unknown(key: str) -> None:
    """Also those of other optimizers, and at False: they might be a slip of the pen."""
    with pytest.raises(TypeError, match=key):
        Conda([_weight()], **{key: False})


# Parameters


def _zeros(dtype: torch.dtype) -> Tensor:
    return torch.zeros(4, 3, dtype=dtype, requires_grad=dtype.is_complex)


PARAMS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "nothing": (lambda: [], ("empty",)),
    "empty_iterator": (lambda: iter(()), ("empty",)),
    "empty_group": (lambda: [{"params": []}], ("no trainable matrix",)),
    "tensor": (lambda: _weight(), ("iterable",)),
    "none": (lambda: None, ()),
    "number": (lambda: 5, ()),
    "text": (lambda: "abc", ("params", "tensors")),
    "list_of_none": (lambda: [None], ("parameter group 0", "params")),
    "list_of_numbers": (lambda: [1.0], ("parameter group 0", "params")),
    "list_with_text": (lambda: [_weight(), "weight"], ("parameter group 0", "params")),
    "nested": (lambda: [[_weight()]], ("parameter group 0", "params")),
    "dict_by_name": (lambda: {"up.weight": _weight()}, ("params",)),
    "triple": (lambda: [("up.weight", _weight(), 1)], ("parameter group 0", "params")),
    "pair_reversed": (lambda: [(_weight(), "up.weight")], ("parameter group 0", "params")),
    "name_a_number": (lambda: [(5, _weight())], ("parameter group 0", "name")),
    "name_none": (lambda: [(None, _weight()), ("up.weight", _weight())], ("name",)),
    "names_in_part": (lambda: [("up.weight", _weight()), _weight()], ("name",)),
    "names_of_one_path": (lambda: [("up.weight", _weight()), _weight(3)], ("name",)),
    "names_of_one_group": (
        lambda: [{"params": [("up.weight", _weight())]}, {"params": [_weight()]}],
        ("name",),
    ),
    "names_too_few": (
        lambda: [{"params": [_weight(), _weight()], "param_names": ["up.weight"]}],
        ("parameter group 0", "param_names"),
    ),
    "names_too_many": (
        lambda: [{"params": [_weight()], "param_names": ["up.weight", "down.weight"]}],
        ("parameter group 0", "param_names"),
    ),
    "set": (lambda: {_weight(), _weight()}, ("order", "set")),
    "set_in_group": (
        lambda: [{"params": {_weight(), _weight()}}],
        ("parameter group 0", "order", "set"),
    ),
    "group_of_none": (lambda: [{"params": None}], ("parameter group 0", "params")),
    "group_of_number": (lambda: [{"params": 5}], ("parameter group 0", "params")),
    "group_without_params": (lambda: [{"lr": 0.1}], ("parameter group 0", "params")),
    "tensor_for_group": (
        lambda: [{"params": [_weight()]}, _weight()],
        ("parameter group 1", "dict"),
    ),
    "list_for_group": (
        lambda: [{"params": [_weight()]}, [_weight()]],
        ("parameter group 1", "dict"),
    ),
    "not_a_leaf": (lambda: [("up.weight", _weight() * 2)], ("up.weight", "leaf")),
    "complex": (
        lambda: [("up.weight", _zeros(torch.complex64))],
        ("up.weight", "view_as_real"),
    ),
    "integer": (lambda: [("up.weight", _zeros(torch.int64))], ("up.weight", "torch.int64")),
    "boolean": (lambda: [("up.weight", _zeros(torch.bool))], ("up.weight", "torch.bool")),
    "float8": (lambda: [("up.weight", _zeros(torch.float8_e4m3fn))], ("up.weight", "float8")),
    "without_name": (
        lambda: [_zeros(torch.int64)],
        ("parameter group 0", "(4, 3)", "torch.int64"),
    ),
    "sparse": (
        lambda: [("up.weight", torch.eye(3).to_sparse().requires_grad_())],
        ("up.weight", "dense", "sparse"),
    ),
    "lazy": (
        lambda: [("up.weight", nn.parameter.UninitializedParameter()), ("b.weight", _weight())],
        ("up.weight", "initialize"),
    ),
}


@pytest.mark.parametrize(("make", "words"), PARAMS.values(), ids=PARAMS)
def test_parameters(make: Callable[[], Any], words: tuple[str, ...]) -> None:
    _refused(lambda: Conda(make()), *words)


@pytest.mark.parametrize("shape", [(), (5,), (0,), (0, 5), (3, 0), (0, 4, 4), (2, 4, 0)])
def test_what_is_no_matrix_on_the_conda_path(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.zeros(shape))
    group = {"params": [("up.weight", param)], "algorithm": "conda"}
    _refused(lambda: Conda([group]), "parameter group 0", "up.weight", str(shape), "adamw")
    Conda([{**group, "algorithm": "adamw"}])
    Conda([("up.weight", param), ("down.weight", _weight())])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_parameters_twice() -> None:
    """torch still only warns of a parameter twice in one group, which would step twice."""
    weight, other = _weight(), _weight()
    _refused(lambda: Conda([{"params": [weight]}, {"params": [weight]}]), "more than one")
    _refused(lambda: Conda([weight, other, weight]), "parameter group 0", "twice")
    names = [("a.weight", weight), ("c.weight", other), ("b.weight", weight)]
    _refused(lambda: Conda(names), "b.weight")


def test_generators() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    for params in (
        model.parameters(),
        model.named_parameters(),
        (p for p in model.parameters()),
        ({"params": layer.parameters()} for layer in model),
        ({"params": layer.named_parameters(prefix=str(i))} for i, layer in enumerate(model)),
        [{"params": model[0].weight}, {"params": (p for p in model[1].parameters())}],
        tuple(model.parameters()),
        nn.ParameterList(model.parameters()),
        nn.ParameterDict({"weight": model[0].weight}).values(),
    ):
        optimizer = Conda(params)
        toys.take(optimizer, *_one_step(optimizer))
        assert next(row["shape"] for row in optimizer.report(show=False)) == (3, 4)


def test_names_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    names = [g["param_names"] for g in Conda(model.named_parameters()).param_groups]
    assert names == [["0.weight", "0.bias", "1.weight", "1.bias"]]
    groups = [{"params": list(model[0].parameters()), "param_names": ["a.weight", "a.bias"]}]
    names = [g["param_names"] for g in Conda(groups).param_groups]
    assert names == [["a.weight", "a.bias"]]
    assert not any("param_names" in g for g in Conda(model.parameters()).param_groups)


def test_the_groups_of_the_caller_are_left_alone() -> None:
    group = {"params": [_weight(), _weight(3)], "lr": 0.1, "foreach": True}
    before = {key: list(v) if isinstance(v, list) else v for key, v in group.items()}
    Conda([group])
    assert group.keys() == before.keys()
    assert group["lr"] == 0.1
    assert len(group["params"]) == 2  # type: ignore[arg-type]


# In a step


def test_sparse_gradients() -> None:
    """As AdamW, and it says which parameter and what to do."""
    model = nn.ModuleDict({"words": nn.Embedding(5, 3, sparse=True), "up": nn.Linear(3, 3)})
    optimizer = Conda(model.named_parameters())
    model["up"](model["words"](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"words\.weight.*sparse=False"):
        optimizer.step()


def test_a_matrix_replaced_by_what_is_none() -> None:
    """Flattening after construction, as some wrappers do: the error says so, not an index."""
    optimizer = Conda([("up.weight", _weight())])
    flat = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(12))
    flat.grad = torch.ones(12)
    _refused(optimizer.step, "up.weight", "(12,)")
    _refused(optimizer.init_state, "up.weight", "(12,)")


# Anything at all


def _one_step(optimizer: Conda) -> tuple[list[Tensor], list[list[Tensor]]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return params, toys.gradients(params, 1)


NUMBERS = st.one_of(st.floats(0, 10), st.integers(0, 5), st.just(np.float64(0.5)))
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.floats(-10, -1e-9),
    st.just(math.nan),
    st.just(math.inf),
    st.just(10**400),
    st.complex_numbers(max_magnitude=1),
    st.lists(st.floats(0, 1), max_size=3),
    st.just(torch.tensor([0.1, 0.2])),
    st.just(torch.tensor(0.1)),
    st.just(np.float32(0.1)),
    st.just(torch.float32),
    st.just(object()),
)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "lr": NUMBERS,
    "eps": st.floats(1e-12, 1),
    "weight_decay": NUMBERS,
    "scale": NUMBERS,
    "adamw_scale": NUMBERS,
    "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
    "update_proj_gap": st.integers(1, 10**30),
    "correct_bias": st.booleans(),
    "state_dtype": st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16]),
    "matmul_dtype": st.sampled_from([None, torch.float32, torch.float64, "bfloat16", "tf32"]),
    "second_moment_dtype": st.sampled_from([None, torch.float32, torch.bfloat16, torch.uint8]),
    "basis_budget": st.none() | st.integers(0, 10**15),
    "buffer_bytes": st.integers(1, 10**15),
    "basis_dtype": st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16]),
    "refresh_delay": st.integers(0, 10**30),
    "diagnostics_every": st.integers(0, 10**30),
}
OF_GROUPS = (
    "lr",
    "eps",
    "weight_decay",
    "scale",
    "adamw_scale",
    "betas",
    "update_proj_gap",
    "correct_bias",
)


@st.composite
def _arguments(draw: st.DrawFn, names: tuple[str, ...], junk: bool) -> dict[str, Any]:
    chosen = draw(st.sets(st.sampled_from(names)))
    spoilt = draw(st.sampled_from(sorted(chosen))) if junk and chosen else None
    return {n: draw(JUNK if n == spoilt else VALID[n]) for n in sorted(chosen)}


def _train(arguments: dict[str, Any], group: dict[str, Any]) -> None:
    params = toys.parameters((4, 3), (2, 5), (2, 3, 3), (4,), ())
    optimizer = Conda([{"params": params, **group}], **arguments)
    toys.take(optimizer, *_one_step(optimizer))
    assert all(param.isfinite().all() for param in params), optimizer


@given(_arguments(tuple(VALID), junk=False), _arguments(OF_GROUPS, junk=False))
@settings(max_examples=150, deadline=None)
def test_what_is_valid_trains(arguments: dict[str, Any], group: dict[str, Any]) -> None:
    _train(arguments, group)


@given(_arguments(tuple(VALID), junk=True), _arguments(OF_GROUPS, junk=True))
@settings(max_examples=250, deadline=None)
def test_anything_else_trains_or_is_refused(
    arguments: dict[str, Any], group: dict[str, Any]
) -> None:
    said = None
    try:
        _train(arguments, group)
    except (TypeError, ValueError) as refusal:
        said = str(refusal)
    assert said is None or any(name in said for name in (*arguments, *group)), said
