"""Sets the precision of float32 matrix products, independently of torch's process-wide flags.

Flags let float32 products round their operands to TF32 or bfloat16. They hold for the whole
process, so a change in one thread affects all others at once. There is an old form of the flags
(``torch.set_float32_matmul_precision``, ``torch.backends.cuda.matmul.allow_tf32``) and a new one
(``fp32_precision``). If the two contradict each other, torch raises an error when the old form is
read. Setting the old form also sets the new one, and kernels read the new one. So the functions
here read and write only the new form, and restore what they found.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter
"""The functions behind ``torch.backends``. Its properties are not used, because some set another
flag than they read: mkldnn's set the flag of all backends."""

MATMUL = ("cuda", "matmul"), ("mkldnn", "matmul")
"""The flags that matrix products read, on CUDA and on CPUs. A flag of "none" has the value of its
parent: the flag of its backend, or of all backends."""
ALL: tuple[str, str] = ("generic", "all")
ROUNDED = ("tf32", "bf16")


class _Thread(threading.local):
    leaves_flags = False


_thread = _Thread()


@contextmanager
def leaving_flags() -> Iterator[None]:
    """In this block, this thread does not change flags.

    For a background thread: a change would affect the products of the training thread.
    :func:`exact_product` then multiplies in float64 instead.
    """
    before, _thread.leaves_flags = _thread.leaves_flags, True
    try:
        yield
    finally:
        _thread.leaves_flags = before


def leaves_flags() -> bool:
    """Whether this thread is in a block of :func:`leaving_flags`."""
    return _thread.leaves_flags


@contextmanager
def matmul_precision(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """In this block, float32 matrix products have the given precision, whatever the flags are.

    The block should contain only these products, because it also affects the products of other
    threads. It does nothing in a block of :func:`leaving_flags`.

    Args:
        precision: "ieee": operands are not rounded; or "tf32": CUDA may round them to TF32, and
            CPUs do not round.
    """
    changed = []
    try:
        for flag in () if _thread.leaves_flags else MATMUL:
            found, wanted = _get(*flag), precision if flag[0] == "cuda" else "ieee"
            if wanted != found and (wanted == "tf32" or found in ROUNDED):
                changed.append((flag, "none" if _inherits(flag) else found))
                _set(*flag, wanted)
        yield
    finally:
        for flag, before in changed:
            _set(*flag, before)


def _inherits(flag: tuple[str, str]) -> bool:
    """Whether a flag has its value from its backend's flag, or from the flag of all backends.

    Such a flag must be restored to "none". If it were restored to its value, it would not follow
    what the user sets for all backends later. torch has no function that tells, so this changes the
    parent flags for a moment and looks whether the flag changes with them.
    """
    backend = flag[0], "all"
    return _follows(flag, ALL) or (not _follows(backend, ALL) and _follows(flag, backend))


def _follows(flag: tuple[str, str], parent: tuple[str, str]) -> bool:
    """Whether a flag changes with its parent. The parent's value must be its own."""
    found, before = _get(*flag), _get(*parent)
    _set(*parent, "tf32" if found == "ieee" else "ieee")
    try:
        return bool(_get(*flag) != found)
    finally:
        _set(*parent, before)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` without rounding the operands, for Gram matrices and rotations.

    Args:
        a: (..., m, k), in at least float32.
        b: (..., k, n), of the same dtype.

    Returns:
        The product (..., m, n), of the same dtype.
    """
    if _thread.leaves_flags:
        return (a.double() @ b.double()).to(a.dtype)
    with matmul_precision("ieee"):
        return a @ b
