"""The reference: Conda as the paper writes it, for one process.

It follows the order of operations of arXiv 2509.24218 and of the authors' released code: the
momentum stays in the weight's own coordinates and is projected anew at every step. It is slow but
easy to check, and the tests compare everything fast in this package with it. It imports nothing
of the package.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor


class ReferenceConda(torch.optim.Optimizer):
    """Conda on plain tensors, in the paper's order of operations.

    Args:
        params: tensors or group dicts. Weights of two or more dimensions are projected; one of
            more than two is a batch of matrices, which are its last two dimensions. Other weights,
            and all weights of a group with ``algorithm="adamw"``, take Adam's step.
        lr: learning rate.
        betas: decay rates of the first and the second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, applied after the update.
        scale: multiplies the update of projected weights.
        adamw_scale: multiplies the update of all other weights.
        update_proj_gap: steps between two decompositions of the momentum.
        correct_bias: whether to divide the moments by 1 - beta^t.
        nesterov: whether projected weights step by N = b1 M + (1 - b1) G in place of the first
            moment M. This is not in the paper.
        basis_source: "momentum", or "gradients": then bases are eigenvectors of averages of G^T G
            if m >= n, and of G G^T if m <= n. This is not in the paper.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scale: float = 0.25,
        adamw_scale: float = 1.0,
        update_proj_gap: int = 2000,
        correct_bias: bool = True,
        nesterov: bool = False,
        basis_source: str = "momentum",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "adamw_scale": adamw_scale,
            "update_proj_gap": update_proj_gap,
            "correct_bias": correct_bias,
            "nesterov": nesterov,
            "basis_source": basis_source,
            "algorithm": "conda",
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step, and returns what ``closure`` returned, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(
                        param, param.grad.to(torch.promote_types(param.dtype, torch.float32)), group
                    )
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        projected = group["algorithm"] == "conda" and param.ndim >= 2
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(grad)  # (m, n), in the weight's coordinates
            state["exp_avg_sq"] = torch.zeros_like(grad)  # (m, n), in the coordinates of the bases
        state["exp_avg"].lerp_(grad, 1 - beta1)
        if not state["step"] and not state["exp_avg"].any():
            return  # a first momentum of zeros has no basis yet: its SVD would be the identity

        from_gradients = projected and group["basis_source"] == "gradients"
        if projected:
            if from_gradients:
                grams = [None if x is None else (1 - beta2) * x for x in gram_matrices(grad)]
                before = state.get("grams", (None, None))
                state["grams"] = [
                    new if old is None else beta2 * old + new
                    for old, new in zip(before, grams, strict=True)
                ]
            if state["step"] % group["update_proj_gap"] == 0:
                momentum = state["exp_avg"]
                state["bases"] = (
                    eigenvectors(state["grams"]) if from_gradients else decompose(momentum)
                )
            bases = state["bases"]  # U (m, m) and V (n, n); one of them may be None
            if from_gradients and not state["step"]:  # what gives the first bases is in no moment
                state["exp_avg"].zero_()
                state["step"] = 1
                param.sub_(group["lr"] * group["weight_decay"] * param)
                return
            exp_avg, grad = project(state["exp_avg"], *bases), project(grad, *bases)
        else:
            exp_avg = state["exp_avg"]
        state["step"] += 1
        # The weights of the gradients in the second moment add up to 1 - b2^squared, and those in
        # the first one to 1 - b1^averaged.
        squared = averaged = state["step"] - from_gradients
        if projected and group["nesterov"]:
            exp_avg, averaged = beta1 * exp_avg + (1 - beta1) * grad, averaged + 1
        state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad**2)
        update = exp_avg / (state["exp_avg_sq"].sqrt() + group["eps"])
        if projected:
            update = group["scale"] * project_back(update, *bases)
        else:
            update = group["adamw_scale"] * update

        step_size = group["lr"]
        if group["correct_bias"]:
            step_size *= math.sqrt(1 - beta2**squared) / (1 - beta1**averaged)
        param.sub_(step_size * update)
        param.sub_(group["lr"] * group["weight_decay"] * param)


Sides = Sequence[Tensor | None]
"""What belongs to the left side of a matrix (m, n), of shape (m, m), and to the right, (n, n)."""


def decompose(exp_avg: Tensor) -> Sides:
    """The basis of a momentum (..., m, n): V (n, n) of its SVD if m >= n, else U (m, m)."""
    svd = torch.linalg.svd(exp_avg, full_matrices=False)
    return (None, svd.Vh.mT) if exp_avg.shape[-2] >= exp_avg.shape[-1] else (svd.U, None)


def gram_matrices(x: Tensor) -> Sides:
    """``x x^T`` if m <= n, and ``x^T x`` if m >= n, of ``x`` (..., m, n)."""
    m, n = x.shape[-2:]
    return x @ x.mT if m <= n else None, x.mT @ x if m >= n else None


def eigenvectors(grams: Sides) -> Sides:
    """The eigenvectors of Gram matrices, in descending order of the eigenvalues."""
    return [None if s is None else torch.linalg.eigh(s).eigenvectors.flip(-1) for s in grams]


def project(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Coordinates of ``x`` (..., m, n) in the bases: ``U^T x V``, without what is None."""
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def project_back(y: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Inverse of :func:`project`: ``U y V^T``."""
    y = y if left is None else left @ y
    return y if right is None else y @ right.mT
