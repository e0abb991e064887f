"""Moments in few bits: second moments in 8, and bfloat16 moments rounded up or down."""

import torch
from torch import Tensor

LEVELS_PER_OCTAVE, FIRST_OCTAVE = 1.5, -60
"""The code of a second moment in 8 bits: 0 is zero, c > 0 is 2^(FIRST_OCTAVE + (c - 1) / 1.5), from
2^-60, whose root is a tenth of the usual eps, to 2^109: a spike of the gradient that had no code
would leave a first moment that nothing divides down. Every element is by itself, without scales of
blocks, so that codes can be sharded and resharded as the numbers they stand for."""


def dither(step: int) -> float:
    """What is added before rounding down in a step: the golden ratio's multiples, modulo 1.

    Over steps they fill [0, 1) evenly (Weyl's theorem), so that a value is rounded up as often as
    it is near the number above, and small changes are not lost; more evenly than random numbers
    would, and without any to draw, or to keep in a checkpoint.
    """
    return step * 0.6180339887498949 % 1.0


def rounding_of(moment: Tensor, step: int, stochastic: bool) -> float | None:
    """What is added before a moment is rounded down in a step; None to round it to nearest."""
    # Codes are so far apart that rounded to nearest they would never change.
    shifted = moment.dtype == torch.uint8 or (stochastic and moment.dtype == torch.bfloat16)
    return dither(step) if shifted else None


def decode(exp_avg_sq: Tensor, dtype: torch.dtype) -> Tensor:
    """The second moment in ``dtype``: its numbers if it is in codes, itself where it is not."""
    if exp_avg_sq.dtype != torch.uint8:
        return exp_avg_sq.to(dtype)
    octaves = exp_avg_sq.to(torch.promote_types(dtype, torch.float32))
    octaves.sub_(1).div_(LEVELS_PER_OCTAVE).add_(FIRST_OCTAVE).exp2_()
    return octaves.masked_fill_(exp_avg_sq == 0, 0.0).to(dtype)


def store_(moment: Tensor, value: Tensor, rounding: float | None) -> None:
    """Rounds a moment to where it is kept.

    Args:
        moment: bfloat16, or codes of a second moment in uint8, or of more bits.
        value: what it shall be, in at least float32.
        rounding: from :func:`rounding_of`, in units of the last place.
    """
    if moment.dtype == torch.uint8:
        levels = value.log2().sub_(FIRST_OCTAVE).mul_(LEVELS_PER_OCTAVE)
        levels.add_(1 + (0.5 if rounding is None else rounding)).floor_().clamp_(0, 255)
        # A NaN has no code; the first moment has it, too, and keeps it.
        moment.copy_(levels.nan_to_num_(255.0))
    elif rounding is None:
        moment.copy_(value)
    else:
        value = value.float()
        bits = value.view(torch.int32).add(int(rounding * 2**16)).bitwise_and_(-(2**16))
        # The bits of a NaN may overflow into those of zero.
        moment.copy_(bits.view(torch.float32).where(value.isfinite(), value))
