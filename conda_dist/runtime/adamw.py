"""Parameters on the adamw path, and their step."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conda_dist.layout.layout import Layout
from conda_dist.numerics.adamw import Entry, adamw_
from conda_dist.options import Options
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.states import has_own, moment_dtype, second_dtype, second_key
from conda_dist.runtime import dtensor
from conda_dist.runtime.collectives import Mesh


@dataclass(frozen=True, slots=True)
class AdamWParameter:
    """A parameter on the adamw path.

    Attributes:
        name: the parameter's fully qualified name, or a generated one.
        param: the parameter.
        mesh: the ranks that share the parameter.
        layout: layout of the parameter and its moments.
        group: the parameter group that contains it.
        states: ``optimizer.state``.
        options: the optimizer's options.
    """

    name: str
    param: Tensor
    mesh: Mesh
    layout: Layout
    group: dict[str, Any]
    states: MutableMapping[Tensor, dict[str, Any]]
    options: Options

    @property
    def state(self) -> dict[str, Any]:
        """The parameter's entry of ``optimizer.state``; {} if there is none."""
        return self.states.get(self.param, {})

    def state_layouts(self) -> dict[str, Layout]:
        """The layout of each state, by name."""
        return {"exp_avg": self.layout, self.second_key: self.layout}

    counts = ()
    """Names of counts in addition to "step": none."""

    @property
    def second_key(self) -> str:
        """Name of the state that is the second moment."""
        return second_key(self.options)

    def saved_key(self, key: str) -> str:
        """The name of a state in checkpoints."""
        return key

    def init_state(self) -> None:
        """Allocates the state, unless it exists."""
        if has_own(self.state):
            return
        state = self.states.setdefault(self.param, {})
        local = dtensor.local(self.param)
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for name, layout in self.state_layouts().items():
            of = second_dtype if name == self.second_key else moment_dtype
            elements = torch.zeros_like(local, dtype=of(self.param.dtype, self.options))
            state[name] = dtensor.like(self.param, layout, elements)


def adamw_step(
    adamw_parameters: Iterable[AdamWParameter],
    grads: Mapping[Tensor, Tensor | None],
    stochastic: bool,
) -> None:
    """Takes one step of the parameters on the adamw path.

    Parameters of the same group that have taken the same number of steps are updated together.

    Args:
        adamw_parameters: the parameters.
        grads: the local gradient of each parameter; a parameter with None is not changed.
        stochastic: see :func:`conda_dist.numerics.adamw.adamw_`.
    """
    alike: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    groups = {}
    for parameter in adamw_parameters:
        grad = grads[parameter.param]
        if grad is None:
            continue
        state, groups[id(parameter.group)] = parameter.state, parameter.group
        state["step"] += 1
        alike[id(parameter.group), int(state["step"])].append(
            Entry(
                parameter.name,
                dtensor.local(parameter.param),
                grad,
                dtensor.local(state["exp_avg"]),
                dtensor.local(state[parameter.second_key]),
            )
        )
    for (group, step), entries in alike.items():
        adamw_(entries, step, hyper_of(groups[group], "adamw_scale"), stochastic)
