"""The base class of all optimizers here: torch.optim's interface on top of the plans of a step."""

import operator
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from conda_dist.checkpoint import MatchedState, fill_state, match_state
from conda_dist.options import Options
from conda_dist.parameter_groups import SHARED, check_hyperparameters, read_group
from conda_dist.parameter_names import ParameterNames, check_paths, named_parameters
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
from conda_dist.runtime.diagnostics import Diagnostics, Signals, read
from conda_dist.runtime.environment import refuse_capture, without_autocast
from conda_dist.runtime.foreign_state import keep
from conda_dist.runtime.parameters import Setup, find_meshes, set_up
from conda_dist.runtime.saved_state import agree_to_load, convert
from conda_dist.runtime.step import MatrixPath


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps the matrices of a model by a rule, and all other parameters by AdamW.

    The base of :class:`conda_dist.Conda`, :class:`conda_dist.Muon` and their like. Parameters are
    plain tensors or DTensors with any placements of Shard and Replicate; see Conda.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        arguments: the arguments of the subclass, by name. Those that are hyperparameters of its
            rule become the defaults of the groups.
        rule: the arithmetic of a step on a matrix.
        options: the options of the whole optimizer.
        process_group: for plain parameters: ranks whose parameters and gradients are equal.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a parameter cannot be optimized, or no matrix of
            the model would take the rule's path.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        arguments: Mapping[str, Any],
        rule: Rule,
        options: Options,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._rule, self._options = rule, options
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}"
            )
        self._shared_group = SharedGroup(process_group)
        self._setup: Setup | None = None
        self._path: MatrixPath | None = None
        self._diagnostics: Diagnostics | None = None
        self._choices: dict[tuple[Tensor, int | None], Choice] = {}
        self._names = ParameterNames()
        self._checked: list[dict[str, Any]] = []
        self._constructed = False
        if isinstance(params, set | frozenset):
            raise TypeError("params must be ordered, not a set: ranks must agree on the order")
        defaults = {name: arguments[name] for name in self._hyperparameters() if name != "splits"}
        check_hyperparameters(defaults)
        rule.check(defaults, "")
        defaults |= {"algorithm": None, "splits": None, "rule": rule.name}
        super().__init__(params, defaults)
        self._constructed = True
        refuse_flat(named_parameters(self.param_groups), rule.title)
        self._names.warn_if_ambiguous(self.param_groups, stacklevel=3)
        check_paths(self.param_groups, world() == 1, stacklevel=3)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. Its parameters get state at the next step; all others keep their state.

        Raises:
            TypeError: see :class:`MatrixOptimizer`.
            ValueError: see :class:`MatrixOptimizer`.
        """
        super().add_param_group(
            self._read_group(param_group, f"parameter group {len(self.param_groups)}: ")
        )
        self._setup = None
        self._names.record_added(self.param_groups)
        if self._constructed:
            self._names.warn_if_ambiguous(self.param_groups, stacklevel=2)

    def _hyperparameters(self) -> tuple[str, ...]:
        """The keys of a group that are hyperparameters."""
        return (*SHARED, *self._rule.hyperparameters)

    def _read_group(self, group: dict[str, Any], where: str) -> dict[str, Any]:
        read = read_group(group, where, self._rule.name, self._hyperparameters())
        self._rule.check(read, where)
        return read

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]  # the host decides what a step does
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step.

        A parameter without a gradient does not change. Either all ranks that share a parameter have
        its gradient, or none has. If ranks differ, a later step raises: the next one if it
        exchanges that gradient, else the next one with a refresh (within 200 steps for a rule
        without refreshes). If the first gradient of a weight with bases comes on some ranks alone,
        these wait for the others until the process group's timeout. A first step in which all
        gradients are zero changes nothing and is not counted. The same is true of each matrix with
        bases until its momentum is not zero.

        ``torch.autocast`` has no effect on a step. ``torch.compile`` does not compile it: a
        compiled function calls it as it is.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            TypeError: a hyperparameter was set to a value of the wrong type.
            ValueError: a hyperparameter was set to a value out of range.
            RuntimeError: a gradient is sparse or has another shape than its parameter; a CUDA graph
                is being captured; or, on all ranks of the mesh together, ranks have different
                plans or different gradients, or a decomposition raised or failed too often.
        """
        loss = None
        if closure is not None:  # it evaluates the model, so it runs under the caller's autocast
            with torch.enable_grad():
                loss = closure()
        with without_autocast():
            self._step()
        return loss

    def _step(self) -> None:
        refuse_capture()
        if self._path is not None:
            self._path.flags.check()
        setup, path = self._resolve(collective=True)
        for comparison in setup.comparisons:
            comparison.compare()
        grads = setup.gradients()
        if not setup.searched_replaced and all(grad is None for grad in grads.values()):
            setup.refuse_strangers()
            setup.searched_replaced = True
        weights, others = setup.stepping(grads)
        collection = None
        if self._diagnostics is not None:
            collection = self._diagnostics.begin(grads, setup.started)
        path.step({i: grads[setup.weights[i].param] for i in weights}, collection)
        if collection is None:
            adamw_step(others, grads, self._options.stochastic_rounding)
        else:
            for other in others:  # one by one, so that only one is copied at a time
                with collection.change(other):
                    adamw_step([other], grads, self._options.stochastic_rounding)
            collection.finish()
        for comparison in setup.comparisons:
            comparison.schedule_next()

    def init_state(self) -> None:
        """Allocates all state now, for frameworks that save before the first step.

        Raises:
            ValueError: a parameter's layout cannot be planned.
        """
        self._resolve()[0].init_state()

    def report(self, *, show: bool = True) -> list[Row]:
        """Reports the path, the layout, the owners and the bytes of each trainable parameter.

        Args:
            show: whether the first of the ranks that share the parameters also prints a table.

        Returns:
            A dict for each parameter, or for each part of one that ``splits`` cut; see
            :class:`conda_dist.report.Row`.
        """
        table = rows(self._resolve()[0])
        if show and self.is_first:
            print_table(table)
        return table

    def diagnostics(self, *, summed: bool = False) -> dict[str, Signals]:
        """Returns what the last step that collected has found; see ``diagnostics_every``.

        It communicates nothing, so one rank may call it alone. The values are the same on all ranks
        that share the parameters and, but for rounding, on every layout. A parameter without a
        gradient in that step is left out. Diagnostics are not part of the state: they start anew
        after ``load_state_dict``, in a copy, and if parameters are added, replaced or unfrozen.

        Args:
            summed: whether to sum up the parameters of each path.

        Returns:
            By parameter's name, or by path ("conda", "adamw"), a dict; see
            :class:`conda_dist.runtime.diagnostics.Signals`. Empty before the first collection.
        """
        return read(() if self._diagnostics is None else (self._diagnostics,), summed)

    @property
    def diagnostics_step(self) -> int:
        """The step that has collected what :meth:`diagnostics` returns; 0 before the first."""
        return 0 if self._diagnostics is None else self._diagnostics.step

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the ranks that share the parameters (True on one rank)."""
        return not any(any(mesh.coordinate) for mesh in self._resolve()[0].meshes)

    def _resolve(self, *, collective: bool = False) -> tuple[Setup, MatrixPath]:
        """Returns the planned parameters, and plans them again if they have changed.

        Args:
            collective: whether all ranks call this together; then they compare their plans, and
                allocate state.
        """
        setup, error = self._setup, None
        if setup is None or self._path is None or setup.outdated(self.param_groups, self.state):
            meshes = find_meshes(self.param_groups, self._shared_group.group)
            try:
                self._names.update(self.param_groups)
                refuse_flat(named_parameters(self.param_groups), self._rule.title)
                self._names.refuse_flattened(self.param_groups, self._rule.title)
                self._names.warn_if_ambiguous(self.param_groups, stacklevel=4)
                self._check_groups()
                refuse_lost_state(named_parameters(self.param_groups), self.state)
                setup = self._plan(meshes)
            except Exception as caught:
                if not collective:
                    raise
                # The other ranks wait in agree(): tell them.
                setup, error = Setup([], [], list(dict.fromkeys(meshes.values())), None), caught
        elif collective:
            self._check_groups()
        if collective and not setup.agreed:
            setup.agree(error, new=self._setup is None)
        if setup is not self._setup or self._path is None:
            if self._path is not None:
                self._path.drop()
            self._setup, self._path = setup, MatrixPath(setup.weights, self._options)
            self._diagnostics = None
            if every := self._options.diagnostics_every:
                self._diagnostics = Diagnostics(setup.members, setup.meshes, every)
        return setup, self._path

    def _check_groups(self) -> None:
        """Checks the hyperparameters again, because users and schedulers set them.

        A group is skipped if its values are the same objects as at its last check.
        """
        checked, self._checked = self._checked, []
        for i, group in enumerate(self.param_groups):
            seen = checked[i] if i < len(checked) else {}
            in_place = False  # values that can change in place are always checked
            for key, value in group.items():
                if isinstance(value, list | Tensor) and key not in ("params", "param_names"):
                    in_place = True
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
        """Returns the state in the form of torch's optimizers: for each parameter, states by name.

        Moments have the mesh and the placements of the parameter, and bases have its mesh. For
        weights in compute groups, exchanges copy the states into this form. Then all ranks that
        share the parameters must call this together, and the copies need as much memory as the
        states. If a rank does not call it, then on gloo the others raise an error that names that
        rank, within ten minutes; with other backends they wait for the process group's timeout.

        If a wrapper has put states of its own into ``optimizer.state`` before the first step, this
        allocates all state, because torch's checkpoint tools then expect it.

        Raises:
            ValueError: there is state of parameters that were replaced, or removed from the groups.
            RuntimeError: on all ranks together: ranks had different gradients in the last step (see
                :meth:`step`), have different plans, or did not all call this.
        """
        if self._path is not None:
            self._path.flags.check()
        self._names.update(self.param_groups)
        refuse_lost_state(named_parameters(self.param_groups), self.state)
        refuse_removed(named_parameters(self.param_groups), self.state)
        trainable = [(n, p) for n, p, _ in named_parameters(self.param_groups) if p.requires_grad]
        if is_distributed() and any(has_own(self.state.get(p)) for _, p in trainable):
            refuse_unheld(trainable)
        states = [self.state.get(param) for _, param in trainable]
        if any(state and not has_own(state) for state in states):  # a wrapper's
            self.init_state()
        hook = self.register_state_dict_post_hook(self._convert, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer that any number of ranks saved with any layout.

        Loaded states keep the dtypes and layouts that they have here. The state dict holds DTensors
        of any layout, or whole plain tensors. Everything is checked before anything changes.

        Raises:
            TypeError: an item of the state dict has a type that this optimizer does not save.
            ValueError: the state dict is from another optimizer or other parameters, or is damaged.
        """
        before, matched = self.state, list[MatchedState]()
        self._names.update(self.param_groups)

        # These are hooks so that the user's own hooks see what torch promises: this pre-hook runs
        # after the user's pre-hooks, and this post-hook before the user's post-hooks.
        def match(_: torch.optim.Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            matched[:] = [self._match(incoming)]
            return matched[0].for_torch

        def fill(_: torch.optim.Optimizer) -> None:
            (found,) = matched
            # Copy into allocated states instead of replacing them, so that loading needs no memory.
            for param in found.states:
                if param in before:
                    self.state[param] = {k: v for k, v in before[param].items() if is_own(k)}
            if found.states:
                # Include frozen parameters: they need their state when they are unfrozen.
                setup = self._set_up(found.states)
                setup.init_state()
                fill_state(setup, found.states)
                # Plan again: a Setup reads at its start which meshes have steps.
                self._setup = self._diagnostics = None
            for param, others in found.wrapper_states.items():
                self.state[param].update(keep(others, param, before.get(param)))

        hooks = (
            self.register_load_state_dict_pre_hook(match),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        for g in matched[0].merged:
            warnings.warn(
                f"parameter group {g} was saved as several groups, and "
                "torch.distributed.checkpoint gives the hyperparameters of only one of them: check "
                f"its lr, {self.param_groups[g]['lr']:g}, and its other hyperparameters.",
                stacklevel=2,
            )
        if missing := matched[0].missing:
            warnings.warn(
                f"the checkpoint has no state of {', '.join(missing)}, perhaps because they were "
                "frozen; their state starts afresh, as for new parameters.",
                stacklevel=2,
            )

    def _match(self, incoming: dict[str, Any]) -> MatchedState:
        """Checks a state dict. Ranks that will exchange its elements raise errors together."""
        error, matched = None, None
        try:
            names = self._hyperparameters()
            matched = match_state(self.param_groups, incoming, self._rule, names)
        except Exception as caught:
            error = caught
        agree_to_load(self._set_up().weights, {} if matched is None else matched.states, error)
        if matched is None:
            assert error is not None
            raise error
        return matched

    def _set_up(self, frozen: Container[Tensor] = ()) -> Setup:
        """Plans the parameters that are trainable or in ``frozen``."""
        return self._plan(find_meshes(self.param_groups, self._shared_group.group, frozen))

    def _plan(self, meshes: Mapping[Tensor, Mesh]) -> Setup:
        groups, options = self.param_groups, self._options
        return set_up(groups, self.state, options, meshes, self._choices, self._rule)

    @staticmethod
    @torch.no_grad()
    def _convert(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """In a state dict, replaces the states of compute groups by DTensors of the whole mesh."""
        assert isinstance(optimizer, MatrixOptimizer)
        if not any(map(has_own, optimizer.state.values())):
            return
        weights = [w for w in optimizer._set_up(optimizer.state).weights if has_own(w.state)]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        convert(weights, params, state_dict["state"])

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle contains: everything but plans, which the copy makes itself."""
        self._names.update(self.param_groups)
        names = ("_rule", "_options", "_shared_group", "_names", "_constructed", "_choices")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fills a copy or an unpickled optimizer; torch's ``load_state_dict`` also calls this."""
        super().__setstate__(state)
        self._setup = self._path = self._diagnostics = None
        self._checked = []
