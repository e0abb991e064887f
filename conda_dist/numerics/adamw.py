"""The adamw path: AdamW for parameters that are not projected, with torch's fused kernels.

All operations are elementwise, so they work on any shard. As in the authors' code, eps is added to
the square root of the second moment before the bias correction, and weight decay comes after the
update.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conda_dist.numerics.arithmetic import Hyper, can_fuse, check_alike, fused_adamw_
from conda_dist.numerics.low_precision import decode, rounding_of, store_


@dataclass(frozen=True, slots=True)
class Entry:
    """This rank's shard of a parameter, of its gradient and of its moments; all of one shape."""

    name: str
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


CHUNK_NUMEL = 2**24
"""Elements that are updated at a time without the fused kernel. It bounds the temporary memory."""


def adamw_(entries: Sequence[Entry], step: int, hyper: Hyper, stochastic: bool = False) -> None:
    """Takes an AdamW step of some parameters, in place.

    Args:
        entries: the parameters; all have taken the same number of steps.
        step: that number, this step included, so from 1.
        hyper: hyperparameters; ``scale`` is the group's ``adamw_scale``.
        stochastic: whether bfloat16 moments are rounded up with a frequency proportional to the
            rounded part, instead of to nearest.

    Raises:
        ValueError: the tensors of an entry differ in shape or device. Nothing is changed then.
    """
    alike: dict[Any, tuple[list[Entry], list[Entry]]] = defaultdict(lambda: ([], []))
    for entry in entries:
        dtypes = entry.param.dtype, entry.exp_avg.dtype, entry.exp_avg_sq.dtype
        fused, others = alike[entry.param.device, *dtypes]
        if _is_fusable(entry, hyper):
            fused.append(entry)
            continue
        moments = {"exp_avg": entry.exp_avg, "exp_avg_sq": entry.exp_avg_sq}
        check_alike(entry.name, {"parameter": entry.param, "gradient": entry.grad, **moments})
        if entry.param.numel():
            others.append(entry)
    for fused, others in alike.values():
        _fused(fused, step, hyper)
        chunk, numel = [], 0
        for entry in itertools.chain.from_iterable(map(_pieces, others)):
            chunk.append(entry)
            numel += entry.param.numel()
            if numel >= CHUNK_NUMEL:
                _foreach(chunk, step, hyper, stochastic)
                chunk, numel = [], 0
        _foreach(chunk, step, hyper, stochastic)


def _pieces(entry: Entry) -> Iterator[Entry]:
    """Cuts a parameter larger than a chunk into chunks, if all its tensors are contiguous."""
    tensors = entry.param, entry.grad, entry.exp_avg, entry.exp_avg_sq
    if entry.param.numel() <= CHUNK_NUMEL or not all(t.is_contiguous() for t in tensors):
        yield entry
        return
    pieces = (torch.split(tensor.view(-1), CHUNK_NUMEL) for tensor in tensors)
    for parts in zip(*pieces, strict=True):
        yield Entry(entry.name, *parts)


def _is_fusable(entry: Entry, hyper: Hyper) -> bool:
    """Whether torch's fused kernel can update this entry."""
    here = not isinstance(hyper.lr, Tensor) or hyper.lr.device == entry.param.device
    return here and can_fuse(entry.param, entry.grad, entry.exp_avg, entry.exp_avg_sq)


def _fused(entries: Sequence[Entry], step: int, hyper: Hyper) -> None:
    """Updates entries of one device and dtype with torch's fused kernel."""
    if not entries:
        return
    params = [entry.param for entry in entries]
    fused_adamw_(
        params,
        [entry.grad for entry in entries],
        [entry.exp_avg for entry in entries],
        [entry.exp_avg_sq for entry in entries],
        step if hyper.correct_bias else math.inf,
        hyper.lr if hyper.scale == 1 else hyper.lr * hyper.scale,
        hyper,
    )
    if hyper.weight_decay:
        torch._foreach_mul_(params, hyper.keep)


def _foreach(entries: Sequence[Entry], step: int, hyper: Hyper, stochastic: bool) -> None:
    """Updates entries of one device and equal dtypes with foreach operations."""
    if not entries:
        return
    params = [entry.param for entry in entries]
    # Compute in at least float32, and round moments of fewer bits once, at the end.
    work = torch.promote_types(entries[0].exp_avg.dtype, torch.float32)
    grads = [entry.grad.to(work) for entry in entries]
    exp_avgs = [entry.exp_avg.to(work) for entry in entries]
    exp_avg_sqs = [decode(entry.exp_avg_sq, work) for entry in entries]

    torch._foreach_lerp_(exp_avgs, grads, 1 - hyper.beta1)
    torch._foreach_mul_(exp_avg_sqs, hyper.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - hyper.beta2)
    for kept, values in (
        ([entry.exp_avg for entry in entries], exp_avgs),
        ([entry.exp_avg_sq for entry in entries], exp_avg_sqs),
    ):
        if (rounding := rounding_of(kept[0], step, stochastic)) is not None:
            for moment, value in zip(kept, values, strict=True):
                store_(moment, value, rounding)
        elif kept[0].dtype != work:
            torch._foreach_copy_(kept, values)

    updates = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(updates, hyper.eps)
    torch._foreach_reciprocal_(updates)
    torch._foreach_mul_(updates, exp_avgs)
    torch._foreach_mul_(updates, hyper.step_size(step))
    torch._foreach_sub_(params, updates)
    if hyper.weight_decay:
        torch._foreach_mul_(params, hyper.keep)
