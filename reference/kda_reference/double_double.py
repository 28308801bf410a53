"""Numbers of 106 bits as unevaluated sums of two doubles, on NumPy arrays: precise enough to judge float64, fast enough for full size.

A value is ``hi + lo`` with ``|lo| <= ulp(hi) / 2``. Sums and products of doubles split without error into such pairs [DK];
everything else follows, with a relative error of a few ``2^-104`` per operation for magnitudes from 1e-140 to 1e140. Functions
start from their double and take one Newton step, which squares its relative error.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import factorial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

SPLITTER = 2.0**27 + 1
# log 2 to 40 digits.
LOG_2 = Fraction(6931471805599453094172321214581765680755, 10**40)
HALVINGS, TERMS = 6, 13


@dataclass(frozen=True, slots=True, eq=False)
class DoubleDouble:
    """An array of 106-bit numbers ``hi + lo``; arithmetic broadcasts, and mixes with arrays of doubles."""

    hi: Doubles
    lo: Doubles

    @classmethod
    def of(cls, x: DoubleDouble | Doubles | float) -> DoubleDouble:
        """Return ``x`` itself, without error."""
        if isinstance(x, DoubleDouble):
            return x
        hi = np.asarray(x, dtype=np.float64)
        return cls(hi, np.zeros_like(hi))

    @classmethod
    def nearest(cls, x: Fraction) -> DoubleDouble:
        """Return the double nearest to a rational number, and the one nearest to what is left."""
        hi = float(x)
        return cls(np.asarray(hi), np.asarray(float(x - Fraction(hi))))

    def __add__(self, other: DoubleDouble | Doubles | float) -> DoubleDouble:
        """Return the sum; cancellation costs no relative accuracy beyond that of the terms."""
        other = DoubleDouble.of(other)
        high, error = _two_sum(self.hi, other.hi)
        low, rest = _two_sum(self.lo, other.lo)
        high, error = _fast_two_sum(high, error + low)
        return DoubleDouble(*_fast_two_sum(high, error + rest))

    def __neg__(self) -> DoubleDouble:
        """Return the negative, exactly."""
        return DoubleDouble(-self.hi, -self.lo)

    def __sub__(self, other: DoubleDouble | Doubles | float) -> DoubleDouble:
        """Return the difference."""
        return self + -DoubleDouble.of(other)

    def __mul__(self, other: DoubleDouble | Doubles | float) -> DoubleDouble:
        """Return the product."""
        other = DoubleDouble.of(other)
        high, error = _two_product(self.hi, other.hi)
        return DoubleDouble(*_fast_two_sum(high, error + (self.hi * other.lo + self.lo * other.hi)))

    def __getitem__(self, index: Any) -> DoubleDouble:  # noqa: ANN401 - whatever NumPy takes
        """Return a part, exactly."""
        return DoubleDouble(self.hi[index], self.lo[index])

    def sum(self, axis: int) -> DoubleDouble:
        """Return the sum along an axis, added up in pairs."""
        terms = DoubleDouble(np.moveaxis(self.hi, axis, 0), np.moveaxis(self.lo, axis, 0))
        if not len(terms.hi):
            return DoubleDouble(np.zeros(terms.hi.shape[1:]), np.zeros(terms.hi.shape[1:]))
        while (number := len(terms.hi)) > 1:
            half = number // 2
            paired = terms[:half] + terms[half : 2 * half]
            terms = paired if number % 2 == 0 else join([paired, terms[2 * half :]], np.concatenate)
        return terms[0]

    def times_power_of_two(self, exponent: NDArray[np.int64] | int) -> DoubleDouble:
        """Return the product with ``2 ** exponent``, exactly but for underflow."""
        return DoubleDouble(np.ldexp(self.hi, exponent), np.ldexp(self.lo, exponent))


def join(parts: list[DoubleDouble], how: Any) -> DoubleDouble:  # noqa: ANN401 - np.stack or np.concatenate
    """Join arrays by ``np.stack`` or ``np.concatenate`` along their first axis."""
    return DoubleDouble(how([part.hi for part in parts]), how([part.lo for part in parts]))


def reciprocal(x: DoubleDouble) -> DoubleDouble:
    """Return ``1 / x``."""
    start = 1 / x.hi
    return DoubleDouble.of(start) + (DoubleDouble.of(1.0) - x * start) * start


def inverse_root(x: DoubleDouble) -> DoubleDouble:
    """Return ``1 / sqrt(x)``."""
    start = DoubleDouble.of(1 / np.sqrt(x.hi))
    return start + (DoubleDouble.of(1.0) - x * start * start) * start * 0.5


def expm1(x: DoubleDouble) -> DoubleDouble:
    """Return ``exp(x) - 1`` for ``|x| <= 1``, with a small relative error near zero too."""
    x = x.times_power_of_two(-HALVINGS)
    series = DoubleDouble.of(np.zeros_like(x.hi))
    for n in range(TERMS, 0, -1):
        series = (series + DoubleDouble.nearest(Fraction(1, factorial(n)))) * x
    for _ in range(HALVINGS):
        series = series * (series + 2.0)
    return series


def exp(x: DoubleDouble) -> DoubleDouble:
    """Return ``exp(x)``; zero where it underflows."""
    x = DoubleDouble(np.maximum(x.hi, -1000.0), np.where(x.hi < -1000.0, 0.0, x.lo))  # noqa: PLR2004 - exp(-1000) is zero
    exponent = np.rint(x.hi / float(LOG_2))
    rest = x - DoubleDouble.nearest(LOG_2) * exponent
    return (expm1(rest) + 1.0).times_power_of_two(exponent.astype(np.int64))


def log1p(x: DoubleDouble) -> DoubleDouble:
    """Return ``log(1 + x)`` for ``0 <= x <= 1``."""
    start = DoubleDouble.of(np.log1p(x.hi))
    return start + (x - expm1(start)) * reciprocal(x + 1.0)


def sigmoid(x: DoubleDouble) -> DoubleDouble:
    """Return ``1 / (1 + exp(-x))``, with a small relative error at either end."""
    small = exp(_minus_magnitude(x))
    share = reciprocal(small + 1.0)
    return where(x.hi >= 0, share, small * share)


def softplus(x: DoubleDouble) -> DoubleDouble:
    """Return ``log(1 + exp(x))``."""
    positive = where(x.hi >= 0, x, DoubleDouble.of(np.zeros_like(x.hi)))
    return positive + log1p(exp(_minus_magnitude(x)))


def where(condition: NDArray[np.bool_], one: DoubleDouble, other: DoubleDouble) -> DoubleDouble:
    """Choose by element."""
    return DoubleDouble(np.where(condition, one.hi, other.hi), np.where(condition, one.lo, other.lo))


def _minus_magnitude(x: DoubleDouble) -> DoubleDouble:
    return where(x.hi >= 0, -x, x)


def _two_sum(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _fast_two_sum(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    total = a + b
    return total, b - (total - a)


def _split(a: Doubles) -> tuple[Doubles, Doubles]:
    shifted = SPLITTER * a
    high = shifted - (shifted - a)
    return high, a - high


def _two_product(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
