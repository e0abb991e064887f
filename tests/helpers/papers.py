"""Steps of NorMuon, NAMO and NAMO-D on one matrix in float64, in the order of their papers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _polar(matrix: Tensor) -> Tensor:
    """Five steps of Muon's Newton-Schulz iteration."""
    x = matrix / matrix.norm()
    if matrix.shape[0] > matrix.shape[1]:
        return _polar(matrix.T).T
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def normuon(
    weight: Tensor,
    grads: Sequence[Tensor],
    lr: float = 0.02,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-10,
    nesterov: bool = True,
) -> Tensor:
    """Algorithm 1 of arXiv 2510.05491, with the released code's momentum and rate."""
    (m, n), first = weight.shape, torch.zeros_like(weight)
    second = weight.new_zeros(m)
    for grad in grads:
        first = momentum * first + (1 - momentum) * grad
        polar = _polar(momentum * first + (1 - momentum) * grad if nesterov else first)
        for i in range(m):
            second[i] = beta2 * second[i] + (1 - beta2) * (polar[i] ** 2).sum() / n
        update = torch.stack([polar[i] / (second[i].sqrt() + eps) for i in range(m)])
        rate = lr * math.sqrt(max(1, m / n)) * polar.norm() / (update.norm() + eps)
        weight = weight - lr * weight_decay * weight - rate * update
    return weight


def namo(
    weight: Tensor,
    grads: Sequence[Tensor],
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    beta2: float = 0.99,
    eps: float = 1e-8,
    nesterov: bool = True,
) -> Tensor:
    """Algorithm 1 of arXiv 2602.17080, with the released code's momentum and bounds."""
    first, second = torch.zeros_like(weight), 0.0
    for t, grad in enumerate(grads, 1):
        first = momentum * first + (1 - momentum) * grad
        second = beta2 * second + (1 - beta2) * float(grad.norm() ** 2)
        ahead = momentum * first + (1 - momentum) * grad if nesterov else first
        corrected = math.sqrt(1 - beta2**t) / (1 - momentum**t)
        rate = lr * corrected * float(ahead.norm()) / (math.sqrt(second) + eps)
        weight = weight - weight_decay * min(rate, 1) * weight
        weight = weight - min(0.2 * math.sqrt(max(weight.shape)) * rate, 1) * _polar(ahead)
    return weight


def namo_d(
    weight: Tensor,
    grads: Sequence[Tensor],
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    beta2: float = 0.99,
    eps: float = 1e-8,
    nesterov: bool = True,
    clamp: float = 0.75,
) -> Tensor:
    """Algorithm 2 of arXiv 2602.17080, with the released code's momentum and bounds."""
    n, first = weight.shape[1], torch.zeros_like(weight)
    second = [0.0] * n
    for t, grad in enumerate(grads, 1):
        first = momentum * first + (1 - momentum) * grad
        ahead = momentum * first + (1 - momentum) * grad if nesterov else first
        polar, rates = _polar(ahead), []
        for j in range(n):
            second[j] = beta2 * second[j] + (1 - beta2) * float(grad[:, j].norm() ** 2)
            rates.append(float(ahead[:, j].norm()) / (math.sqrt(second[j]) + eps))
        mean, columns = sum(rates) / n, []
        for j in range(n):
            rate = min(max(rates[j], clamp * mean), mean / clamp)
            rate *= lr * math.sqrt(1 - beta2**t) / (1 - momentum**t)
            column = weight[:, j] - weight_decay * min(rate, 1) * weight[:, j]
            bounded = min(0.2 * math.sqrt(max(weight.shape)) * rate, 1)
            columns.append(column - bounded * polar[:, j])
        weight = torch.stack(columns, 1)
    return weight
