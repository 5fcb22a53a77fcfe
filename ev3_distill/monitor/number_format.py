"""Formatting of numbers on screens and pages.

Fractions are shown as percentages. Bounds are rounded so that no more is claimed than was proven. None and nan are shown as
MISSING.
"""

import math
import re
from decimal import ROUND_FLOOR, Decimal

MISSING = "\u2013"


def is_missing(value: float | None) -> bool:
    """Whether a value is None or nan."""
    return value is None or math.isnan(value)


def fixed_percent(fraction: float, digits: int, *, sign: str = "-", rounding: str | None = None) -> str:
    """A fraction as a percentage with `digits` decimals, without the percent sign."""
    exact = Decimal(str(fraction))  # the shortest decimal, so that a bound of 0.289 is not shown as 28.8 %
    rounded = (exact * 100).quantize(Decimal(1).scaleb(-digits), rounding=rounding)
    return f"{abs(rounded) if rounded == 0 else rounded:{sign},f}".replace("-", "\u2212")


def significant(value: float, digits: int, rounding: str) -> str:
    """A number with `digits` significant digits."""
    exact = Decimal(str(value))
    if not exact or not exact.is_finite():
        return str(value)
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=rounding)
    return f"{rounded:f}".replace("-", "\u2212")


def percent(fraction: float | None) -> str:
    """0.9412 -> 94.1 %."""
    return MISSING if fraction is None or is_missing(fraction) else f"{fixed_percent(fraction, 1)} %"


def floor_percent(fraction: float | None) -> str:
    """0.9419 -> 94.1 %: a lower bound, rounded down."""
    if fraction is None or is_missing(fraction):
        return MISSING
    return f"{fixed_percent(fraction, 1, rounding=ROUND_FLOOR)} %"


def exact_percent(fraction: float) -> str:
    """0.95 -> 95 %, 0.999 -> 99.9 %; ten digits of the fraction are kept."""
    return f"{(Decimal(str(round(fraction, 10))) * 100).normalize():f} %"


def points(difference: float | None) -> str:
    """0.0123 -> +1.23 percentage points."""
    return MISSING if difference is None or is_missing(difference) else fixed_percent(difference, 2, sign="+")


def floor_points(difference: float | None) -> str:
    """0.0123 -> +1.23 percentage points: a lower bound, rounded down."""
    if difference is None or is_missing(difference):
        return MISSING
    return fixed_percent(difference, 2, sign="+", rounding=ROUND_FLOOR)


def count(number: float | None) -> str:
    """12345 -> 12,345."""
    return MISSING if number is None or is_missing(number) else f"{number:,.0f}"


def ratio(value: float | None) -> str:
    """12.34 -> 12.3\u00d7."""
    return MISSING if value is None or is_missing(value) else f"{value:,.1f}\u00d7"


def duration(seconds: float | None) -> str:
    """75.2 -> 1 min 15 s."""
    if seconds is None or is_missing(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def scientific(value: float | None) -> str:
    """0.0123 -> 0.012, 0.0000123 -> 1.2e-5."""
    return MISSING if value is None or is_missing(value) else re.sub(r"e-0*", "e\u2212", f"{value:.2g}")


def unbroken(text: str) -> str:
    """Keep numbers and their percent signs on one line."""
    return text.replace(" %", "\u00a0%")
