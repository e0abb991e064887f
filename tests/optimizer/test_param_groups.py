"""What a user can say about the routing, and a model that has nothing to project."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toys
from conda_dist import Conda, param_groups
from conda_dist.routing import clean_name


class Toy(nn.Module):
    """Two blocks between a table and a head, with names that tell nothing of either."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.bag = nn.EmbeddingBag(10, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"up": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "router": nn.Linear(6, 3)}
            )
            for _ in range(2)
        )
        self.out = nn.Linear(6, 10, bias=False)
        self.kernel = nn.Conv2d(2, 3, 2)


UP = {"blocks.0.up.weight", "blocks.1.up.weight"}


def _conda_names(model: nn.Module, **arguments: Any) -> set[str]:
    return {n for n, a in toys.chosen(param_groups(model, **arguments)).items() if a == "conda"}


def test_groups_are_in_order_and_named() -> None:
    model = Toy()
    groups = param_groups(model)
    assert [group["algorithm"] for group in groups] == ["conda", "adamw"]
    order = [name for name, _ in model.named_parameters()]
    for group in groups:
        names = [name for name, _ in group["params"]]
        assert names == sorted(names, key=order.index)
    held = dict(pair for group in groups for pair in group["params"])
    assert held.keys() == set(order)
    assert all(held[name] is param for name, param in model.named_parameters())
    optimizer = Conda(groups)
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(group["params"]) for group in groups
    ]


def test_embeddings_are_known_by_their_type() -> None:
    assert _conda_names(Toy()) == UP


def test_embeddings_tied_to_a_head_of_any_name() -> None:
    model = Toy()
    model.out = nn.Linear(4, 10, bias=False)
    model.out.weight = model.table.weight
    assert _conda_names(model) == UP
    model = Toy()
    del model.table  # now the head comes first, and gives the name
    model.out = nn.Linear(4, 10, bias=False)
    model.table = nn.Embedding(10, 4)
    model.table.weight = model.out.weight
    assert _conda_names(model) == UP


class Headed(nn.Module):
    """Blocks and a head that only a method tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))
        self.to_words = nn.Linear(4, 9)
        self.connector = nn.Linear(4, 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.to_words


class Gated(nn.Module):
    """A gated MLP that is narrower than the model, and a router of more experts than features."""

    def __init__(self) -> None:
        super().__init__()
        mlp = {"gate": nn.Linear(8, 4), "up": nn.Linear(8, 4), "down": nn.Linear(4, 8)}
        moe = {"gate": nn.Linear(8, 16), "experts": nn.ModuleList(nn.Linear(8, 8) for _ in "ab")}
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict(mlp)})])
        self.layers.append(nn.ModuleDict({"mlp": nn.ModuleDict(moe)}))


def _blocks(**others: nn.Module) -> nn.Module:
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6)}) for _ in range(2))
    return nn.ModuleDict({"blocks": blocks, **others})


BY_MODULE: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "a method": (Headed, UP | {"connector.weight"}),
    "a method of a wrapped model": (
        lambda: nn.ModuleDict({"module": Headed()}),
        {f"module.{name}" for name in UP | {"connector.weight"}},
    ),
    "the last outside blocks": (
        lambda: _blocks(bridge=nn.Linear(4, 4), fc=nn.Linear(4, 3)),
        UP | {"bridge.weight"},
    ),
    "the last in a list": (
        lambda: _blocks(readout=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))),
        UP | {"readout.0.weight"},
    ),
    "the last after a list of layers": (
        lambda: nn.ModuleDict(
            {"layers": nn.ModuleList(nn.Linear(4, 4) for _ in "ab"), "out": nn.Linear(4, 3)}
        ),
        {"layers.0.weight", "layers.1.weight"},
    ),
    "as many outputs as an embedding has rows": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)),
        {"1.weight"},
    ),
    "an MLP has no head that can be told": (
        lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)),
        {"0.weight", "2.weight"},
    ),
    "gates": (
        Gated,
        {f"layers.0.mlp.{name}.weight" for name in ("gate", "up", "down")}
        | {f"layers.1.mlp.experts.{i}.weight" for i in range(2)},
    ),
    "a norm of several heads": (
        lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 4)),
        {"1.weight"},
    ),
}


@pytest.mark.parametrize(("make", "expected"), BY_MODULE.values(), ids=BY_MODULE)
def test_what_modules_tell(make: Callable[[], nn.Module], expected: set[str]) -> None:
    assert _conda_names(make()) == expected


def test_names_that_cannot_tell_are_warned_of() -> None:
    """Once, with the way to do better; not for what is in blocks, nor for small models without."""
    with pytest.warns(UserWarning, match=r"2 mat.*: table\.weight, out\.weight\. .*param_groups"):
        Conda((name, p) for name, p in Toy().named_parameters() if "bag" not in name)
    with pytest.warns(UserWarning, match=r"2 matrices .*\.mlp\.gate\.weight"):
        Conda(Gated().named_parameters())
    tall = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64), nn.Linear(64, 1000))
    with pytest.warns(UserWarning, match=r"0\.weight, 2\.weight"):
        Conda(tall.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Conda(param_groups(Toy()))
        Conda(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).named_parameters())


def test_a_model_with_one_path_only() -> None:
    groups = param_groups(nn.Linear(3, 3, bias=False))
    assert [group["algorithm"] for group in groups] == ["conda"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"adamw": ["out.weight"]}, UP),
        ({"conda": ["out.weight"]}, UP | {"out.weight"}),
        ({"conda": ["out.*"], "adamw": ["*.bias"]}, UP | {"out.weight"}),
        ({"adamw": ["blocks.0.*"]}, {"blocks.1.up.weight"}),
        ({"conda": ["out.weight"], "adamw": ["blocks.[01].up.weight"]}, {"out.weight"}),
        (
            {"conda": ["*.router.weight"]},
            UP | {"blocks.0.router.weight", "blocks.1.router.weight"},
        ),
        ({"conda": ["table.weight"]}, UP | {"table.weight"}),
        ({"conda": ["kernel.weight"]}, UP | {"kernel.weight"}),
        # adamw wins
        (
            {"conda": ["*.router.weight"], "adamw": ["blocks.0.*"]},
            {"blocks.1.up.weight", "blocks.1.router.weight"},
        ),
        ({"conda": ["out.weight"], "adamw": ["out.weight"]}, UP),
    ],
)
def test_patterns(patterns: dict[str, list[str]], expected: set[str]) -> None:
    assert _conda_names(Toy(), **patterns) == expected
    wrapped = nn.ModuleDict({"_orig_mod": Toy()})
    assert {clean_name(n) for n in _conda_names(wrapped, **patterns)} == expected


@pytest.mark.parametrize("side", ["conda", "adamw"])
def test_a_pattern_that_matches_nothing(side: str) -> None:
    with pytest.raises(ValueError, match=r"'head\.\*' matches no parameter.*'table\.weight'"):
        param_groups(Toy(), **{side: ["head.*"]})
    with pytest.raises(ValueError, match="matches no parameter"):
        param_groups(Toy(), **{side: ["OUT.weight"]})


@pytest.mark.parametrize("side", ["conda", "adamw"])
def test_a_pattern_in_place_of_a_list(side: str) -> None:
    """A text is a sequence of letters, of which "*" matches everything."""
    with pytest.raises(TypeError, match=side):
        param_groups(Toy(), **{side: "*.up.weight"})


def test_a_pattern_for_what_is_no_matrix() -> None:
    for pattern in ("*.bias", "*.norm.weight"):
        with pytest.raises(ValueError, match="adamw"):
            param_groups(Toy(), conda=[pattern])


def test_options_of_the_paths() -> None:
    options = {"conda_options": {"weight_decay": 0.1}, "adamw_options": {"lr": 1e-3, "eps": 1e-6}}
    groups = param_groups(Toy(), **options)
    optimizer = Conda(groups, lr=0.02)
    conda, adamw = optimizer.param_groups
    assert (conda["lr"], conda["weight_decay"], conda["eps"]) == (0.02, 0.1, 1e-8)
    assert (adamw["lr"], adamw["weight_decay"], adamw["eps"]) == (1e-3, 0.0, 1e-6)
    with pytest.raises(ValueError, match="weight_decay"):
        Conda(param_groups(Toy(), adamw_options={"weigth_decay": 0.1}))


@pytest.mark.parametrize("key", ["algorithm", "params", "param_names"])
def test_options_that_would_undo_the_routing(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        param_groups(Toy(), conda_options={key: "adamw"})


def test_the_model_is_left_alone() -> None:
    model = Toy()
    before = {name: id(param) for name, param in model.named_parameters()}
    param_groups(model, conda=["*.router.weight"])
    assert {name: id(param) for name, param in model.named_parameters()} == before


# Nothing to project


def _frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)


BY_PATTERN, AS_ADAMW = 'conda=["pattern"]', 'algorithm="adamw"'
NOTHING: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "norm": (lambda: nn.LayerNorm(4), "weight (4,): 1-D", AS_ADAMW),
    "embedding": (
        lambda: nn.ModuleDict({"embed": nn.Embedding(9, 4)}),
        "embed.weight (9, 4): embedding",
        BY_PATTERN,
    ),
    "head": (lambda: nn.ModuleDict({"lm_head": nn.Linear(4, 9)}), "output head", BY_PATTERN),
    "kernel": (lambda: nn.Conv2d(2, 3, 2), "kernel", "kernels=True"),
    "frozen": (_frozen, "0.weight (4, 4), frozen: a matrix", "require gradients"),
    "nothing": (lambda: nn.Identity(), "0 parameters", AS_ADAMW),
}


@pytest.mark.parametrize(("make", "words", "advice"), NOTHING.values(), ids=NOTHING)
def test_nothing_to_project(make: Callable[[], nn.Module], words: str, advice: str) -> None:
    """The error lists what was found and says what to do, which works."""
    ways: list[Callable[[], object]] = [lambda: param_groups(make())]
    if words != "0 parameters":
        ways.append(lambda: Conda(make().named_parameters()))
    for way in ways:
        with pytest.raises(ValueError, match="no trainable matrix") as caught:
            way()
        assert words in str(caught.value)
        found = [
            said for said in (BY_PATTERN, AS_ADAMW, "kernels=True") if said in str(caught.value)
        ]
        assert found == ([advice] if advice != "require gradients" else [])
        assert advice in str(caught.value)


def test_what_is_advised_where_there_is_no_matrix() -> None:
    norm = nn.LayerNorm(4)
    assert Conda([{"params": list(norm.named_parameters()), "algorithm": "adamw"}]).report()
    assert Conda(param_groups(nn.Conv2d(2, 3, 2), kernels=True)).report()


@pytest.mark.parametrize("of", [param_groups, lambda model: Conda(model.named_parameters())])
def test_a_model_whose_matrices_are_all_frozen(of: Callable[[nn.Module], object]) -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "norm": nn.LayerNorm(6)})
    model["up"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"up\.weight \(6, 4\), frozen"):
        of(model)


def test_a_long_list_is_cut() -> None:
    model = nn.ModuleList(nn.LayerNorm(3) for _ in range(50))
    with pytest.raises(ValueError, match="100 parameters") as caught:
        param_groups(model)
    assert len(str(caught.value)) < 1000


def test_groups_for_adamw_alone_are_the_users_choice() -> None:
    model = nn.LayerNorm(4)
    Conda([{"params": model.parameters(), "algorithm": "adamw"}])
    Conda([{"params": nn.Linear(3, 3).parameters(), "algorithm": "adamw"}])


def test_groups_added_later_may_have_no_matrix() -> None:
    optimizer = Conda(nn.Linear(3, 3).parameters())
    optimizer.add_param_group({"params": nn.LayerNorm(3).parameters()})
    assert sorted(toys.paths(optimizer).values()) == ["adamw"] * 3 + ["conda"]


def test_one_group_with_a_matrix_is_enough() -> None:
    norms, matrix = nn.LayerNorm(3), nn.Linear(3, 3)
    groups = [{"params": norms.parameters()}, {"params": matrix.parameters()}]
    assert toys.paths(Conda(groups))["param_groups[1]['params'][0]"] == "conda"


# LoRA


class Adapted(nn.Module):
    """A frozen projection with a low-rank adapter, named as peft does."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.base_layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + adapted


def test_adapters() -> None:
    """A's first gradient is zero: its step must count only once there is a momentum."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "q_proj": Adapted()})
    model["embed"].requires_grad_(False)
    groups = param_groups(model)
    trained = {n for g in groups for n, p in g["params"] if p.requires_grad}
    assert trained == {"q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"}
    optimizer = Conda(groups, lr=0.1, update_proj_gap=100)
    frozen = model["q_proj"].base_layer.weight.clone()
    a = model["q_proj"].lora_A["default"].weight
    b = model["q_proj"].lora_B["default"].weight
    for _ in range(3):
        optimizer.zero_grad()
        model["q_proj"](model["embed"](torch.arange(9))).square().sum().backward()
        optimizer.step()
    assert torch.equal(frozen, model["q_proj"].base_layer.weight)
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [2, 3]
    assert not torch.equal(optimizer.state[a]["basis"], torch.eye(2))
    rows = optimizer.report(show=False)
    assert {row["name"] for row in rows} == trained


def test_the_report_gives_the_reason() -> None:
    rows = Conda(param_groups(Toy(), conda=["*.router.weight"])).report(show=False)
    paths = {row["name"]: (row["path"], row["reason"]) for row in rows}
    assert paths["blocks.0.up.weight"] == ("conda", "a matrix")
    assert paths["blocks.0.up.bias"] == ("adamw", "1-D")
    assert paths["kernel.weight"][0] == "adamw"
    assert "kernel" in paths["kernel.weight"][1]
    # The names below say something else than their type, or than the user: no such reason is given.
    assert paths["blocks.0.router.weight"][0] == "conda"
    assert paths["blocks.0.router.weight"][1] != "router"
    assert paths["table.weight"][0] == "adamw"
    assert "matrix" not in paths["table.weight"][1]


def test_parameters_without_names_are_warned_of() -> None:
    """A head among nameless matrices would be projected without a word."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    with pytest.warns(UserWarning, match="without names"):
        Conda(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Conda(model.named_parameters())
        Conda([{"params": list(model.parameters()), "algorithm": "adamw"}])


def test_routers_of_several_modules() -> None:
    """What is inside a module that is called a router, or is the gate of experts."""

    class TopRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.scores = nn.Linear(8, 4), nn.Linear(4, 3)

    class Layer(nn.Module):
        def __init__(self, gate: nn.Module) -> None:
            super().__init__()
            self.gate = gate
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in "abc")

    gates = (TopRouter(), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)))
    layers = [nn.ModuleDict({"moe": Layer(gate)}) for gate in gates]
    layers.append(nn.ModuleDict({"chooser": TopRouter(), "up": nn.Linear(8, 8)}))
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    conda = {n for n, path in toys.chosen(param_groups(model)).items() if path == "conda"}
    experts = {f"layers.{i}.moe.experts.{k}.weight" for i in range(2) for k in range(3)}
    assert conda == experts | {"layers.2.up.weight"}
