"""Moments in few bits: second moments in 8-bit codes, and rounding of bfloat16 moments."""

import torch
from torch import Tensor

LEVELS_PER_OCTAVE, FIRST_OCTAVE = 1.5, -60
"""The 8-bit code c of a second moment: 0 means 0, and c > 0 means 2^(FIRST_OCTAVE + (c - 1) / 1.5).

The smallest value is 2^-60, whose square root is a tenth of the usual eps. The largest is 2^109: if
a spike of the gradient exceeded it, its first moment would be divided by too small a number. Every
element has its own code and there are no block scales, so codes can be sharded and resharded like
the numbers that they represent."""


def dither(step: int) -> float:
    """The number in [0, 1) that is added before a value is rounded down, in this step.

    It is ``step`` times the golden ratio, modulo 1. Over the steps these numbers fill [0, 1) evenly
    (Weyl's theorem). So a value is rounded up in proportion to its distance from the number below,
    and small changes are not lost. Unlike random numbers, they need no generator, and no state in
    checkpoints.
    """
    return step * 0.6180339887498949 % 1.0


def rounding_of(moment: Tensor, step: int, stochastic: bool) -> float | None:
    """The number to add before a moment is rounded down in a step; None to round to nearest.

    Args:
        moment: the moment, as it is stored.
        step: number of steps taken.
        stochastic: the option ``stochastic_rounding``, for bfloat16 moments.
    """
    # Codes are so far apart that rounding to nearest would never change them.
    shifted = moment.dtype == torch.uint8 or (stochastic and moment.dtype == torch.bfloat16)
    return dither(step) if shifted else None


def decode(exp_avg_sq: Tensor, dtype: torch.dtype) -> Tensor:
    """A second moment in ``dtype``, decoded if it is in 8-bit codes.

    Args:
        exp_avg_sq: codes (uint8), or numbers of any floating-point dtype.
        dtype: dtype of the result.
    """
    if exp_avg_sq.dtype != torch.uint8:
        return exp_avg_sq.to(dtype)
    octaves = exp_avg_sq.to(torch.promote_types(dtype, torch.float32))
    octaves.sub_(1).div_(LEVELS_PER_OCTAVE).add_(FIRST_OCTAVE).exp2_()
    return octaves.masked_fill_(exp_avg_sq == 0, 0.0).to(dtype)


def store_(moment: Tensor, value: Tensor, rounding: float | None) -> None:
    """Rounds a new value into a stored moment, in place.

    Args:
        moment: the stored moment: 8-bit codes (uint8) of a second moment, bfloat16, or a wider
            floating-point dtype.
        value: the new value, in at least float32.
        rounding: from :func:`rounding_of`, in units of the last place; None to round to nearest.
    """
    if moment.dtype == torch.uint8:
        levels = value.log2().sub_(FIRST_OCTAVE).mul_(LEVELS_PER_OCTAVE)
        levels.add_(1 + (0.5 if rounding is None else rounding)).floor_().clamp_(0, 255)
        # There is no code for NaN. The first moment is NaN then, too, and stays NaN.
        moment.copy_(levels.nan_to_num_(255.0))
    elif rounding is None:
        moment.copy_(value)
    else:
        value = value.float()
        bits = value.view(torch.int32).add(int(rounding * 2**16)).bitwise_and_(-(2**16))
        # Adding to the bits of a NaN could make them those of zero: keep it as it is.
        moment.copy_(bits.view(torch.float32).where(value.isfinite(), value))
