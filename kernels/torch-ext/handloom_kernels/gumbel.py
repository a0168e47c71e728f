"""Gumbel noise that depends on (seed, position, token id) and on nothing else, for the kernels that draw tokens.

    u = first word of Philox-4x32-10 with key = seed and counter = (token id, position, 0, 0)
    U = min((u + 0.5) / 2^32, 1 - 2^-24)
    noise = -log(-log(1 - U))

argmax(scores + noise) has the distribution softmax(scores) (the Gumbel-max trick). Philox: Salmon, Moraes, Dror, Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The noise that decides comes from small U, where log(1 - U) needs its relative accuracy. The hardware's logarithm is
accurate only in absolute terms near 1, so the logarithm here is a polynomial, good to about one unit in the last place
and the same on every device. About 80 integer operations and 40 others a token, no bytes.

This module does not know what a score means. Meaning: `reference.gumbel_noise`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST_UNIFORM = tl.constexpr(1 - 2**-24)  # the largest float32 below 1
_HALF_ROOT = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # a multiple of 2^-16: exact times an exponent
_LN2_LOW = tl.constexpr(1.42860682030941723212e-6)


@triton.jit
def _log_of(exponent, f):
    """exponent * log(2) + log(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1]: a minimax fit, off by 6e-9 at most."""
    fit = tl.fma(f, -0.07634492963552475, 0.12761574983596802)
    fit = tl.fma(f, fit, -0.13160182535648346)
    fit = tl.fma(f, fit, 0.14201758801937103)
    fit = tl.fma(f, fit, -0.16623356938362122)
    fit = tl.fma(f, fit, 0.20001226663589478)
    fit = tl.fma(f, fit, -0.2500081956386566)
    fit = tl.fma(f, fit, 0.3333333134651184)
    log1p = tl.fma(f * f, tl.fma(f, fit, -0.5), f)
    n = exponent.to(tl.float32)
    return tl.fma(n, _LN2_HIGH, tl.fma(n, _LN2_LOW, log1p))


@triton.jit
def _split(x):
    """x = (1 + f) * 2^exponent with f as `_log_of` takes it; x positive and normal."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _HALF_ROOT) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return exponent, f


@triton.jit
def natural_log(x):
    """log(x) of positive normal float32."""
    exponent, f = _split(x)
    return _log_of(exponent, f)


@triton.jit
def noise_of_word(word):
    """Standard Gumbel noise, float32, of a random word, uint32: finite for every word.

    Where 1 - U has no exponent of its own, f is -U itself and not 1 - U - 1, which would have been rounded.
    """
    uniform = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST_UNIFORM)
    exponent, f = _split(1.0 - uniform)
    f = tl.where(exponent == 0, -uniform, f)
    return -natural_log(-_log_of(exponent, f))


@triton.jit
def gumbel_noise(token_ids, seeds, positions):
    """Standard Gumbel noise, float32: token_ids int32, seeds int64, positions int64, broadcast against each other."""
    word, _, _, _ = tl.philox(seeds, token_ids, positions.to(tl.int32), 0, 0)
    return noise_of_word(word)
