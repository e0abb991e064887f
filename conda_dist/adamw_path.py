"""A step of all parameters on the adamw path."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor

from conda_dist import storage
from conda_dist.adamw import Entry, adamw_
from conda_dist.hyperparameters import hyper_of
from conda_dist.setup import Plain


def adamw_step(
    plains: Iterable[Plain], grads: Mapping[Tensor, Tensor | None], stochastic: bool
) -> None:
    """Takes one step; parameters of one group that have taken equally many go together.

    Args:
        plains: the parameters.
        grads: this rank's part of the gradient of each; None for one to leave alone.
        stochastic: as of :func:`conda_dist.adamw.adamw_`.
    """
    alike: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    groups = {}
    for plain in plains:
        grad = grads[plain.param]
        if grad is None:
            continue
        state, groups[id(plain.group)] = plain.state, plain.group
        state["step"] += 1
        alike[id(plain.group), int(state["step"])].append(
            Entry(
                plain.name,
                storage.local(plain.param),
                grad,
                storage.local(state["exp_avg"]),
                storage.local(state[plain.second_key]),
            )
        )
    for (group, step), entries in alike.items():
        adamw_(entries, step, hyper_of(groups[group], "adamw_scale"), stochastic)
