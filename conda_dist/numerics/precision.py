"""The precision of float32 products, whatever the flags of the process say.

TF32 and bfloat16 products are switched on by flags that belong to the process: a thread's change is
seen by all others at once. They exist in an old form (``torch.set_float32_matmul_precision``,
``torch.backends.cuda.matmul.allow_tf32``) and in a new one (``fp32_precision``), and torch raises
when the old form is read while the two contradict each other. The new form is what the kernels
read, and the old form sets it, so the functions here read and write the new form alone, and put
back what they found.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter
"""The functions behind ``torch.backends``, where some properties set another flag than they read:
those of mkldnn set the one of all backends."""

MATMUL = ("cuda", "matmul"), ("mkldnn", "matmul")
"""The flags that products read, on CUDA and on CPUs. Each may be "none", which inherits."""
ALL: tuple[str, str] = ("generic", "all")
ROUNDED = ("tf32", "bf16")


class _Thread(threading.local):
    leaves_flags = False


_thread = _Thread()


@contextmanager
def leaving_flags() -> Iterator[None]:
    """Has this thread leave the flags alone; :func:`exact_product` then multiplies in float64.

    For a thread beside the one that trains, whose products the flags concern.
    """
    before, _thread.leaves_flags = _thread.leaves_flags, True
    try:
        yield
    finally:
        _thread.leaves_flags = before


def leaves_flags() -> bool:
    """Whether this thread leaves the flags alone, see :func:`leaving_flags`."""
    return _thread.leaves_flags


@contextmanager
def matmul_precision(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Multiplies float32 matrices in a precision that does not depend on the flags.

    Keep the block around the products that want it: what other threads enqueue meanwhile is
    multiplied so, too.

    A thread that is :func:`leaving_flags` changes nothing by it.

    Args:
        precision: "ieee", or "tf32": CUDA may round the operands to TF32. CPUs never round.
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
    """Whether a flag has its value from the flag of its backend, or of all backends.

    Put back as its own, such a value would cut the flag off from what the user sets for all
    backends later. No getter tells, so this changes the other flags for a moment.
    """
    backend = flag[0], "all"
    return _follows(flag, ALL) or (not _follows(backend, ALL) and _follows(flag, backend))


def _follows(flag: tuple[str, str], parent: tuple[str, str]) -> bool:
    """Whether a flag changes with its parent, which must not inherit itself."""
    found, before = _get(*flag), _get(*parent)
    _set(*parent, "tf32" if found == "ieee" else "ieee")
    try:
        return bool(_get(*flag) != found)
    finally:
        _set(*parent, before)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in IEEE arithmetic of its dtype or more, for Gram matrices and rotations.

    Args:
        a: (..., m, k), in at least float32.
        b: (..., k, n), of the same dtype.
    """
    if _thread.leaves_flags:
        return (a.double() @ b.double()).to(a.dtype)
    with matmul_precision("ieee"):
        return a @ b
