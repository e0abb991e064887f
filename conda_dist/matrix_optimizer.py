"""The optimizer of matrices by a rule: groups and state as torch's own, the step as planned."""

import operator
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from conda_dist.checkpoint import Loaded, fill_state, match_state
from conda_dist.options import Options
from conda_dist.parameter_groups import SHARED, check_hyperparameters, read_group
from conda_dist.parameter_names import Names, check_paths, each
from conda_dist.plan.compute_groups import Choice
from conda_dist.replaced_parameters import (
    refuse_flat,
    refuse_lost_state,
    refuse_removed,
    refuse_unheld,
)
from conda_dist.report import Row, print_table, rows
from conda_dist.rules.rule import Rule
from conda_dist.rules.states import has_own, is_own
from conda_dist.runtime.adamw import adamw_step
from conda_dist.runtime.collectives import Mesh, SharedGroup, is_distributed, world
from conda_dist.runtime.environment import refuse_capture, without_autocast
from conda_dist.runtime.foreign_state import keep
from conda_dist.runtime.parameters import Setup, find_meshes, set_up
from conda_dist.runtime.saved_state import agree_to_load, convert
from conda_dist.runtime.step import MatrixPath


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps the matrices of a model by a rule, on whatever shards there are, the rest by AdamW.

    What :class:`conda_dist.Conda` and :class:`conda_dist.Muon` have in common. Parameters may be
    plain tensors or DTensors of any layout of Shard and Replicate; see Conda.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        defaults: hyperparameters of its groups, checked.
        rule: what steps the matrices.
        options: what holds for the whole optimizer.
        process_group: for plain parameters: ranks with equal gradients.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of its range, a parameter that cannot be optimized, or a model of
            which no matrix would be on the rule's path.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        rule: Rule,
        options: Options,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._rule, self._options = rule, options
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}"
            )
        self._shared = SharedGroup(process_group)
        self._setup: Setup | None = None
        self._path: MatrixPath | None = None
        self._choices: dict[tuple[Tensor, int | None], Choice] = {}
        self._names: Names = Names()
        self._checked: list[dict[str, Any]] = []
        self._made = False
        if isinstance(params, set | frozenset):
            raise TypeError("params must be ordered, not a set: ranks must agree on the order")
        super().__init__(params, {**defaults, "rule": rule.name})
        self._made = True
        refuse_flat(each(self.param_groups), rule.title)
        self._names.warn(self.param_groups, stacklevel=3)
        check_paths(self.param_groups, world() == 1, stacklevel=3)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; new parameters get their state at the next step, the others keep theirs.

        Raises:
            TypeError: see :class:`MatrixOptimizer`.
            ValueError: see :class:`MatrixOptimizer`.
        """
        super().add_param_group(
            self._read_group(param_group, f"parameter group {len(self.param_groups)}: ")
        )
        self._setup = None
        self._names.added(self.param_groups)
        if self._made:
            self._names.warn(self.param_groups, stacklevel=2)

    def _hyperparameters(self) -> tuple[str, ...]:
        """Keys of its groups, without the parameters and who steps them."""
        return (*SHARED, *self._rule.hyperparameters)

    def _read_group(self, group: dict[str, Any], where: str) -> dict[str, Any]:
        read = read_group(group, where, self._rule.name, self._hyperparameters())
        self._rule.check(read, where)
        return read

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]  # what it does is decided on the host
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step with the gradients there are.

        Parameters without a gradient are left alone; all ranks that share one must have it or
        not. Where they differ, the next step raises if gradients are exchanged, and else the next
        one with a refresh. A first step in which all gradients are zero changes nothing and is not
        counted, nor is the step of a matrix whose momentum is still zero.

        The step is the same inside ``torch.autocast``, and in a function that ``torch.compile``
        compiles, which calls it as it is.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            TypeError: a hyperparameter was set to something of another type.
            ValueError: one was set to something out of its range.
            RuntimeError: a gradient is sparse or of another shape; a CUDA graph is being
                captured; ranks have different plans, or had gradients of different parameters; a
                decomposition raised or failed too often. The last three on all ranks of the mesh
                alike.
        """
        loss = None
        if closure is not None:  # the model is evaluated as the caller would
            with torch.enable_grad():
                loss = closure()
        with without_autocast():
            self._step()
        return loss

    def _step(self) -> None:
        refuse_capture()
        if self._path is not None:
            self._path.flags.check()
        setup, path = self._resolve(agreeing=True)
        for comparison in setup.comparisons:
            comparison.compare()
        grads = setup.gradients()
        if not setup.searched_replaced and all(grad is None for grad in grads.values()):
            setup.refuse_strangers()
            setup.searched_replaced = True
        weights, others = setup.stepping(grads)
        path.step({i: grads[setup.weights[i].param] for i in weights})
        adamw_step(others, grads, self._options.stochastic_rounding)
        for comparison in setup.comparisons:
            comparison.schedule_next()

    def init_state(self) -> None:
        """Allocates all state now, for whoever saves before the first step.

        Raises:
            ValueError: a parameter's layout cannot be planned.
        """
        self._resolve()[0].init_state()

    def report(self, *, show: bool = True) -> list[Row]:
        """What each trainable parameter gets, or each part of one: path, layout, owners, bytes.

        Args:
            show: whether to print it as a table too, on the first of the ranks that share the
                parameters.

        Returns:
            A dict for each parameter or part; see :class:`conda_dist.report.Row`.
        """
        table = rows(self._resolve()[0])
        if show and self.is_first:
            print_table(table)
        return table

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the ranks that share the parameters; always without any."""
        return not any(any(mesh.coordinate) for mesh in self._resolve()[0].meshes)

    def _resolve(self, *, agreeing: bool = False) -> tuple[Setup, MatrixPath]:
        """The parameters with their plans, made anew if they have changed.

        Args:
            agreeing: whether all ranks are here, and are to compare their plans and allocate.
        """
        setup, error = self._setup, None
        if setup is None or self._path is None or setup.outdated(self.param_groups, self.state):
            meshes = find_meshes(self.param_groups, self._shared.group)
            try:
                self._names.follow(self.param_groups)
                refuse_flat(each(self.param_groups), self._rule.title)
                self._names.check(self.param_groups, self._rule.title)
                self._names.warn(self.param_groups, stacklevel=4)
                self._check_groups()
                refuse_lost_state(each(self.param_groups), self.state)
                setup = self._plan(meshes)
            except Exception as caught:
                if not agreeing:
                    raise
                setup, error = Setup([], [], list(dict.fromkeys(meshes.values())), None), caught
        elif agreeing:
            self._check_groups()
        if agreeing and not setup.agreed:
            setup.agree(error, new=self._setup is None)
        if setup is not self._setup or self._path is None:
            if self._path is not None:
                self._path.drop()
            self._setup, self._path = setup, MatrixPath(setup.weights, self._options)
        return setup, self._path

    def _check_groups(self) -> None:
        """Refuses hyperparameters that somebody has set since and that would ruin the weights.

        Groups whose values are the same objects as at the last check are not checked again.
        """
        checked, self._checked = self._checked, []
        for i, group in enumerate(self.param_groups):
            seen = checked[i] if i < len(checked) else {}
            # Values that can change in place are always checked.
            in_place = isinstance(group["lr"], Tensor) or isinstance(group["betas"], list)
            if (
                in_place
                or group.keys() != seen.keys()
                or not all(map(operator.is_, group.values(), seen.values()))
            ):
                check_hyperparameters(group, f"parameter group {i}: ", scheduled=True)
                self._rule.check(group, f"parameter group {i}: ")
                seen = dict(group)
            self._checked.append(seen)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers give it: of every parameter its states by name.

        Moments are DTensors like the parameter, and bases are DTensors on the same mesh. The states
        of weights in compute groups are copies, which exchanges make: then all ranks that share the
        parameters must call this together, and the copies take as much memory as the states. A
        rank that does not call it within ten minutes is named in an error on the others where the
        group's backend is gloo; with another all wait for as long as the group's timeout says.

        A wrapper may have put states of its own beside those of this optimizer before the first
        step. torch's checkpoint tools then take the optimizer for initialised, so it becomes so.

        Raises:
            ValueError: there is state of parameters that were replaced, or taken out of the groups.
            RuntimeError: ranks had different gradients in the last step, see :meth:`step`; or
                some did not call this and had to, or have other plans; on all ranks alike.
        """
        if self._path is not None:
            self._path.flags.check()
        self._names.follow(self.param_groups)
        refuse_lost_state(each(self.param_groups), self.state)
        refuse_removed(each(self.param_groups), self.state)
        trainable = [(n, p) for n, p, _ in each(self.param_groups) if p.requires_grad]
        if is_distributed() and any(has_own(self.state.get(p)) for _, p in trainable):
            refuse_unheld(trainable)
        if any(held and not has_own(held) for held in (self.state.get(p) for _, p in trainable)):
            self.init_state()
        hook = self.register_state_dict_post_hook(self._convert, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, on whatever ranks and layout it was saved.

        States keep the dtypes and layouts they have here; values may be DTensors of any layout
        or whole plain tensors. Everything is checked before anything is changed.

        Raises:
            TypeError: something in the state dict is of another type than this optimizer saves.
            ValueError: the state dict is of another optimizer, of other parameters, or damaged.
        """
        before, found = self.state, list[Loaded]()
        self._names.follow(self.param_groups)

        # As hooks, so that the user's own find what torch promises them: these run last of those
        # before and first of those after.
        def take(_: torch.optim.Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            found[:] = [self._match(incoming)]
            return found[0].rest

        def fill(_: torch.optim.Optimizer) -> None:
            (loaded,) = found
            # What is allocated is filled, not replaced: loading needs no memory of its own.
            for param in loaded.states:
                if param in before:
                    self.state[param] = {k: v for k, v in before[param].items() if is_own(k)}
            if loaded.states:
                # Frozen ones too: their state must be in place when they are unfrozen.
                setup = self._set_up(loaded.states)
                setup.init_state()
                fill_state(setup, loaded.states)
                self._setup = None  # its meshes have started
            for param, others in loaded.others.items():
                self.state[param].update(keep(others, param, before.get(param)))

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        for g in found[0].merged:
            warnings.warn(
                f"parameter group {g} was saved as several groups, of which "
                "torch.distributed.checkpoint gives the hyperparameters of one: check its lr, "
                f"{self.param_groups[g]['lr']:g}, and the others.",
                stacklevel=2,
            )
        if missing := found[0].missing:
            warnings.warn(
                f"the checkpoint has no state of {', '.join(missing)}, perhaps because they were "
                "frozen; their state starts afresh, as of new parameters.",
                stacklevel=2,
            )

    def _match(self, incoming: dict[str, Any]) -> Loaded:
        """Checks a state dict; with all ranks that will exchange its elements, if any will."""
        error, loaded = None, None
        try:
            names = self._hyperparameters()
            loaded = match_state(self.param_groups, incoming, self._rule, names)
        except Exception as caught:
            error = caught
        agree_to_load(self._set_up().weights, {} if loaded is None else loaded.states, error)
        if loaded is None:
            assert error is not None
            raise error
        return loaded

    def _set_up(self, frozen: Container[Tensor] = ()) -> Setup:
        """Plans the parameters that are trainable or in ``frozen``."""
        meshes = find_meshes(self.param_groups, self._shared.group, frozen)
        return self._plan(meshes)

    def _plan(self, meshes: Mapping[Tensor, Mesh]) -> Setup:
        groups, options = self.param_groups, self._options
        return set_up(groups, self.state, options, meshes, self._choices, self._rule)

    @staticmethod
    @torch.no_grad()
    def _convert(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Puts states as checkpoints have them in the place of those that only ranks know."""
        assert isinstance(optimizer, MatrixOptimizer)
        if not any(map(has_own, optimizer.state.values())):
            return
        weights = [w for w in optimizer._set_up(optimizer.state).weights if has_own(w.state)]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        convert(weights, params, state_dict["state"])

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps; plans are made anew."""
        self._names.follow(self.param_groups)
        taken = ("_rule", "_options", "_shared", "_names", "_made", "_choices")
        kept = {name: self.__dict__[name] for name in taken}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes up a copy, a pickle or (called by torch) a loaded state dict."""
        super().__setstate__(state)
        self._setup = self._path = None
        self._checked = []
