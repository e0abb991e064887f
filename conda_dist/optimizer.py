"""The optimizer: groups and state as torch's own, the step as planned."""

import inspect
import warnings
from collections.abc import Callable, Container, Iterable
from dataclasses import fields
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from conda_dist import storage
from conda_dist.adamw_path import adamw_step
from conda_dist.ambience import refuse_capture, without_autocast
from conda_dist.checkpoint import Loaded, fill_state, keep, match_state
from conda_dist.exchange import SharedGroup
from conda_dist.groups import (
    DROPPED,
    HYPERPARAMETERS,
    UNSUPPORTED,
    check_hyperparameters,
    read_group,
)
from conda_dist.names import Names, check_paths, each
from conda_dist.options import Options
from conda_dist.plan.compute_groups import Choice
from conda_dist.replaced import refuse_flat, refuse_lost_state, refuse_removed, refuse_unheld
from conda_dist.report import Row, print_table, rows
from conda_dist.runtime.saved_state import agree_to_load, convert
from conda_dist.runtime.step import CondaPath
from conda_dist.setup import Setup, find_meshes, set_up
from conda_dist.states import has_own, is_own


class Conda(torch.optim.Optimizer):
    r"""Column-Normalized Adam (arXiv 2509.24218), on whatever shards there are.

    For a weight W (m, n) with gradient G and r = min(m, n), after t steps::

        M <- b1 M + (1 - b1) G
        every update_proj_gap steps: Q (r, r) <- right singular vectors of M if m >= n, else left
        v <- b2 v + (1 - b2) proj(G)^2                 proj(X) = X Q, or Q^T X if m < n
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) scale back(proj(M) / (sqrt(v) + eps))
        W <- W - lr weight_decay W

    Parameters may be plain tensors or DTensors of any layout of Shard and Replicate; plain
    parameters are taken to be whole and, in a distributed job, equal on all ranks with equal
    gradients (DDP). A weight of three or more dimensions is a batch of matrices in its last two,
    and with ``kernels=True`` in its group a convolution kernel, seen as a matrix (out, in * k * k).
    Groups may name their ``algorithm``, "conda" or "adamw"; in one that does not each parameter
    takes the path that :func:`conda_dist.routing.route` says for its name and shape, for which it
    should be given ``model.named_parameters()`` or the groups of :func:`conda_dist.param_groups`.
    Layouts and paths are resolved at the first step. On the adamw path an update is Adam's,
    times ``lr`` and ``adamw_scale``.

    State of a parameter, tensors like the parameter (DTensors on its mesh): ``step`` (0-d, on the
    CPU), ``exp_avg`` (m, n), projected on the conda path, ``exp_avg_sq`` (m, n) and there too
    ``basis`` (r, r) and ``basis_step`` (one number for each matrix of a batch, on the CPU: the
    step its basis was taken at, -1 before the first); with ``refresh="async"`` also ``snapshot``
    (m, n) and ``snapshot_step`` (the first moment that a pending refresh began with, and when; -1
    if none is pending). A weight that its group's ``splits`` cut into blocks of rows (see
    :func:`conda_dist.param_groups`) has counts with one entry more for each part in front, and
    ``basis_0``, ``basis_1``, ... in the place of ``basis``.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        lr: learning rate of both paths; a number or a tensor of one element.
        betas: decay rates of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, applied after the update.
        scale: factor on the update of the conda path.
        adamw_scale: factor on the update of the adamw path. Neither factor changes the decay, which
            is ``lr * weight_decay`` on both paths.
        update_proj_gap: steps between two decompositions of the momentum.
        correct_bias: whether to divide out the moments' bias towards zero.
        proj_type: "std"; the released code's other types are refused.
        state_dtype: dtype of the moments; None for the parameter's, but at least float32.
            Bases are at least float32 in any case, unless ``basis_dtype`` says otherwise.
        matmul_dtype: dtype of the two products of a step, such as ``torch.bfloat16``; None for
            the bases'. Decompositions and rotations never use it.
        basis_dtype: dtype of the bases; None for the moments', but at least float32.
            ``torch.bfloat16`` halves what they take and, where they are sharded, send. They are
            orthogonal to 3 digits then, in every refresh anew.
        basis_budget: bytes a rank may spend on bases of weights that it computes with all ranks
            that hold them, each of which has a copy; None for no limit. Weights beyond it are
            dealt to compute groups: few ranks, mostly one, gather the gradient, keep moments and
            basis, and send the update back.
        bucket_bytes: half of what a step may hold beside state, gradients and parameters, in all
            its buffers together; more only where one weight needs more: of those that step
            without communication twice the largest shard, in float32.
        refresh_bytes: half of what a refresh may hold; likewise.
        max_refresh_failures: refreshes of one matrix that may fail in a row before all ranks
            raise.
        refresh_method: how a basis is taken from the momentum after the first, which is always by
            "svd", the paper's way. "orthogonal_iteration" is one step of subspace iteration from
            the basis in use: a fraction of the time, and enough where ``update_proj_gap`` is
            small, for bases then move little. "eigh64" takes the eigenvectors of the momentum's
            Gram matrix in float64.
        refresh: "sync", the paper's timing: a step that is due for a refresh waits for it. "async"
            decomposes a snapshot of the momentum in the background, and all ranks take the new
            bases together ``refresh_delay`` steps later, whenever they are done before; the first
            refresh waits. Costs the memory of a third moment.
        refresh_delay: steps from an asynchronous refresh's snapshot to its new bases; at most one
            interval.
        second_moment_dtype: dtype of the second moments alone. ``torch.uint8`` keeps each element's
            logarithm in 8 bits, in a state ``exp_avg_sq_codes`` in the place of ``exp_avg_sq``,
            rounded up or down in proportion from step to step.
        stochastic_rounding: whether bfloat16 moments are rounded like that too, not to nearest, so
            that changes of less than their last bit add up over steps. Nothing is random: steps
            have the golden ratio's multiples for a threshold, the same in every run.
        compile: whether the elementwise work on the conda path's moments is done in one kernel
            each, made by torch.compile at the first step, which needs what that needs (a C++
            compiler on CPUs, Triton on GPUs). Moments rounded in proportion are left to torch's.
            Without it contiguous moments of float32 or float64 have torch's fused AdamW kernel.
        process_group: for plain parameters: ranks with equal gradients, which then share the
            decompositions out among them instead of each doing all, and cannot drift apart.
        fused: of no effect, as ``foreach``; scripts written for AdamW give them.
        foreach: see ``fused``.
        maximize: must be False, as the next three, which AdamW has.
        capturable: see ``maximize``.
        differentiable: see ``maximize``.
        amsgrad: see ``maximize``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of its range, a parameter that cannot be optimized, or a model of
            which no matrix would be on the conda path.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scale: float = 0.25,
        adamw_scale: float = 1.0,
        update_proj_gap: int = 2000,
        correct_bias: bool = True,
        proj_type: str = "std",
        state_dtype: torch.dtype | None = None,
        matmul_dtype: torch.dtype | None = None,
        basis_dtype: torch.dtype | None = None,
        basis_budget: int | None = 4 * 2**30,
        bucket_bytes: int = 64 * 2**20,
        refresh_bytes: int = 512 * 2**20,
        max_refresh_failures: int = 3,
        refresh_method: str = "svd",
        refresh: str = "sync",
        refresh_delay: int = 20,
        second_moment_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        compile: bool = False,
        process_group: dist.ProcessGroup | None = None,
        fused: bool | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        amsgrad: bool = False,
    ) -> None:
        given = dict(locals())  # all arguments, by name
        for name in UNSUPPORTED:
            if given[name]:
                raise TypeError(f"option {name!r} is not supported by Conda; leave it out.")
        fixed = {"algorithm": None, "splits": None}
        defaults = {name: given[name] for name in HYPERPARAMETERS if name not in fixed} | fixed
        check_hyperparameters({**defaults, "proj_type": proj_type})
        self._options = Options(**{field.name: given[field.name] for field in fields(Options)})
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}"
            )
        self._shared = SharedGroup(process_group)
        self._setup: Setup | None = None
        self._path: CondaPath | None = None
        self._choices: dict[tuple[Tensor, int | None], Choice] = {}
        self._names: Names = Names()
        self._made = False
        if isinstance(params, set | frozenset):
            raise TypeError("params must be ordered, not a set: ranks must agree on the order")
        super().__init__(params, defaults)
        self._made = True
        refuse_flat(each(self.param_groups))
        self._names.warn(self.param_groups, stacklevel=2)
        check_paths(self.param_groups, stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; new parameters get their state at the next step, the others keep theirs.

        Raises:
            TypeError: see :class:`Conda`.
            ValueError: see :class:`Conda`.
        """
        super().add_param_group(
            read_group(param_group, f"parameter group {len(self.param_groups)}: ")
        )
        self._setup = None
        self._names.added(self.param_groups)
        if self._made:
            self._names.warn(self.param_groups, stacklevel=2)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]  # what it does is decided on the host
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step with the gradients there are.

        Parameters without a gradient are left alone; all ranks that share one must have it or
        not. A first step in which all gradients are zero changes nothing and is not counted, nor
        is the step of a matrix whose momentum is still zero.

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
                captured; ranks have different plans; a decomposition raised or failed too often.
                The last two on all ranks of the mesh alike.
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
        setup, path = self._resolve(agreeing=True)
        grads: dict[Tensor, Tensor | None] = {}
        for member in setup.members:  # parts share a parameter, whose gradient is reduced once
            if member.param not in grads:
                grads[member.param] = storage.local_gradient(member.name, member.param)
        if not setup.looked and all(grad is None for grad in grads.values()):
            setup.refuse_strangers()
            setup.looked = True
        live = setup.live(grads)
        path.step(
            {
                i: grad
                for i, weight in enumerate(setup.weights)
                if weight.mesh in live and (grad := grads[weight.param]) is not None
            }
        )
        plains = [plain for plain in setup.plains if plain.mesh in live]
        adamw_step(plains, grads, self._options.stochastic_rounding)

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

    def _resolve(self, *, agreeing: bool = False) -> tuple[Setup, CondaPath]:
        """The parameters with their plans, made anew if they have changed.

        Args:
            agreeing: whether all ranks are here, and are to compare their plans and allocate.
        """
        setup, error = self._setup, None
        if setup is None or self._path is None or setup.outdated(self.param_groups, self.state):
            meshes = find_meshes(self.param_groups, self._shared.group)
            try:
                self._names.follow(self.param_groups)
                refuse_flat(each(self.param_groups))
                self._names.check(self.param_groups)
                self._names.warn(self.param_groups, stacklevel=4)
                self._check_groups()
                refuse_lost_state(each(self.param_groups), self.state)
                setup = set_up(self.param_groups, self.state, self._options, meshes, self._choices)
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
            self._setup, self._path = setup, CondaPath(setup.weights, self._options)
        return setup, self._path

    def _check_groups(self) -> None:
        """Refuses hyperparameters that somebody has set since and that would ruin the weights."""
        for i, group in enumerate(self.param_groups):
            check_hyperparameters(group, f"parameter group {i}: ", scheduled=True)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers give it: of every parameter its states by name.

        Moments are DTensors like the parameter, and bases are DTensors on the same mesh. The states
        of weights in compute groups are copies, which exchanges make: then all ranks that share the
        parameters must call this together, and the copies take as much memory as the states.

        A wrapper may have put states of its own beside those of this optimizer before the first
        step. torch's checkpoint tools then take the optimizer for initialised, so it becomes so.

        Raises:
            ValueError: there is state of parameters that were replaced, or taken out of the groups.
        """
        self._names.follow(self.param_groups)
        refuse_lost_state(each(self.param_groups), self.state)
        refuse_removed(each(self.param_groups), self.state)
        trainable = [(n, p) for n, p, _ in each(self.param_groups) if p.requires_grad]
        if any(has_own(self.state.get(p)) for _, p in trainable):
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
            loaded = match_state(self.param_groups, incoming)
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
        return set_up(self.param_groups, self.state, self._options, meshes, self._choices)

    @staticmethod
    @torch.no_grad()
    def _convert(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Puts states as checkpoints have them in the place of those that only ranks know."""
        assert isinstance(optimizer, Conda)
        if not any(map(has_own, optimizer.state.values())):
            return
        weights = [w for w in optimizer._set_up(optimizer.state).weights if has_own(w.state)]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        convert(weights, params, state_dict["state"])

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps; plans are made anew."""
        self._names.follow(self.param_groups)
        taken = ("_options", "_shared", "_names", "_made", "_choices")
        kept = {name: self.__dict__[name] for name in taken}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes up a copy, a pickle or (called by torch) a loaded state dict."""
        super().__setstate__(state)
        self._setup = self._path = None


ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Conda.__init__).parameters.items()
    if name not in ("self", "params", "process_group", *DROPPED, *UNSUPPORTED)
}
"""Conda's arguments that a configuration can give, with their defaults."""
