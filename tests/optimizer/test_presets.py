"""Presets: every surface gives the same values, explicit values win, and only a draft changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toys
from conda_dist import Conda, param_groups
from conda_dist.options import OPTIONS, PRESETS, with_preset

VALUES: dict[str, dict[str, Any]] = {
    "paper": {
        "betas": (0.9, 0.99),
        "update_proj_gap": 2000,
        "nesterov": False,
        "basis_source": "momentum",
        "refresh_method": "svd",
    },
    "2026-11-draft": {
        "betas": (0.95, 0.98),
        "update_proj_gap": 5,
        "nesterov": True,
        "basis_source": "gradients",
        "refresh_method": "orthogonal_iteration",
    },
}
"""A job that names a preset can be run again, because only a draft may change."""

OTHER = {
    "betas": (0.8, 0.9),
    "update_proj_gap": 7,
    "nesterov": True,
    "basis_source": "gradients",
    "refresh_method": "eigh64",
}
"""A value of each option that no preset has, or that the paper's does not."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 6)])


def _values(optimizer: Conda) -> dict[str, Any]:
    """What the report shows of a weight on the conda path; its group has the same."""
    row = next(row for row in optimizer.report(show=False) if row["path"] == "conda")
    group = next(group for group in optimizer.param_groups if group["algorithm"] == "conda")
    assert all(group[name] == row["settings"][name] for name in group.keys() & OTHER.keys())
    return {name: row["settings"][name] for name in OTHER}


def _by_constructor(given: dict[str, Any]) -> dict[str, Any]:
    return _values(Conda(param_groups(Model()), **given))


def _by_json(given: dict[str, Any]) -> dict[str, Any]:
    from conda_dist.integrations.deepspeed.arguments import parse

    parsed = parse({name: [*v] if name == "betas" else v for name, v in given.items()})
    whole = {name: getattr(parsed.options, name) for name in ("refresh_method", "basis_source")}
    return {**parsed.defaults, **whole}


def _by_toml(given: dict[str, Any]) -> dict[str, Any]:
    from conda_dist.launch.job import options
    from conda_dist.launch.job.optimizers import build_optimizers

    config = options.build({f"optimizer.conda.{name}": value for name, value in given.items()})
    again = options.build(options.to_values(config))
    assert again == config
    (optimizer,) = build_optimizers(Model(), config.optimizer)
    assert isinstance(optimizer, Conda)
    return _values(optimizer)


def _by_torchtitan(given: dict[str, Any]) -> dict[str, Any]:
    from conda_dist.integrations.torchtitan.container import CondaOptimizersContainer

    config = CondaOptimizersContainer.Config(name="conda", **given)
    (optimizer,) = CondaOptimizersContainer(config, model_parts=[Model()]).optimizers
    return _values(optimizer)


SURFACES = [_by_constructor, _by_json, _by_toml, _by_torchtitan]


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("preset", [None, *VALUES])
def test_every_surface_gives_its_values(
    preset: str | None, surface: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Without a preset they are the paper's; an explicit value wins, whatever the preset has."""
    given = {} if preset is None else {"preset": preset}
    values = VALUES[preset or "paper"]
    assert surface(given).items() >= values.items()
    for name, value in OTHER.items():
        assert surface({**given, name: value}).items() >= {**values, name: value}.items()


def test_the_paper_s_values_win_over_a_dated_preset() -> None:
    given = {"preset": "2026-11-draft", **VALUES["paper"]}
    for surface in SURFACES:
        assert surface(given).items() >= VALUES["paper"].items()


def test_presets_are_what_they_were() -> None:
    assert {name: with_preset({"preset": name}) for name in PRESETS} == {
        name: {"preset": name, **values} for name, values in VALUES.items()
    }
    by_preset = {name for name, option in OPTIONS.items() if option.by_preset}
    assert by_preset == {*OTHER}
    for values in PRESETS.values():
        for name, value in values.items():
            assert OPTIONS[name].by_preset
            OPTIONS[name].check(value)


def test_a_preset_steps_as_its_values() -> None:
    ours, theirs = toys.parameters((6, 4), (4, 6)), toys.parameters((6, 4), (4, 6))
    grads = toys.gradients(ours, 12)
    for params, given in ((ours, {"preset": "2026-11-draft"}), (theirs, VALUES["2026-11-draft"])):
        optimizer = Conda([{"params": params, "algorithm": "conda"}], **given)
        toys.take(optimizer, params, grads)
    assert toys.same(ours, theirs)
    paper = toys.parameters((6, 4), (4, 6))
    toys.take(Conda([{"params": paper, "algorithm": "conda"}]), paper, grads)
    assert not toys.same(ours, paper)


def test_a_preset_is_of_the_whole_optimizer() -> None:
    weight = nn.Parameter(torch.eye(3))
    with pytest.raises(
        ValueError, match="preset must be one of paper, 2026-11-draft; got 'papers'"
    ):
        Conda([weight], preset="papers")
    with pytest.raises(ValueError, match="preset holds for the whole optimizer"):
        Conda([{"params": [weight], "preset": "2026-11-draft"}])
    for name in OTHER:
        with pytest.raises((TypeError, ValueError), match=name):  # None is not a group's value
            Conda([{"params": [weight], name: None}])


def test_shipped_configs_leave_the_choice_to_the_preset() -> None:
    """Explicit values win: a config that repeats the paper's would defeat a preset in silence."""
    from conda_dist.launch.job import options

    folder = Path(__file__).parents[2] / "configs"
    own = ("betas", "nesterov", "basis_source")
    for file in folder.glob("*.toml"):
        conda = options.load(file).optimizer.conda
        assert [getattr(conda, name) for name in own] == [None] * 3, file
        if file.stem != "llama_tiny":
            assert (conda.update_proj_gap, conda.refresh_method) == (None, None), file


def test_a_loaded_group_keeps_the_checkpoint_s_values() -> None:
    weight = nn.Parameter(torch.eye(3))
    optimizer = Conda([weight], preset="2026-11-draft")
    optimizer.load_state_dict(Conda([nn.Parameter(torch.eye(3))]).state_dict())
    (row,) = optimizer.report(show=False)
    assert (row["settings"]["betas"], row["settings"]["update_proj_gap"]) == ((0.9, 0.99), 2000)
    del optimizer.param_groups[0]["nesterov"]  # as in a group of an earlier version
    (row,) = optimizer.report(show=False)
    assert "nesterov" not in row["settings"]


def test_a_group_may_differ_from_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (nn.Parameter(toys.random(4, 3)) for _ in range(2))
    optimizer = Conda(
        [{"params": [first]}, {"params": [second], "update_proj_gap": 9}], preset="2026-11-draft"
    )
    assert [group["update_proj_gap"] for group in optimizer.param_groups] == [5, 9]
    optimizer.report()
    said = capsys.readouterr().out
    for gap in (5, 9):
        assert f"update_proj_gap {gap}, correct_bias True, nesterov True" in " ".join(said.split())
