"""How numbers are written for people, the same in the terminal, in figures and on the page."""

from __future__ import annotations

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Three significant digits; a power of ten where the number is very small or large.

    Whole numbers of ordinary size keep their look: 60, not 60.0.
    """
    if value == 0 or (value == int(value) and abs(value) < 1000):
        return f"{value:.0f}"
    if not 1e-3 <= abs(value) < 1e5:
        return power(value)
    size = abs(value)
    if size < 0.9995:
        return f"{value:.3g}"
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{value:,.{decimals}f}"


def power(value: float) -> str:
    """Two digits and a power of ten: 4.5·10⁻¹⁰."""
    if value == 0 or value != value or value in (float("inf"), float("-inf")):
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def duration(seconds: float) -> str:
    """A duration with its unit, three significant digits."""
    if seconds < 1:
        return f"{number(seconds * 1000)} ms"
    return f"{number(seconds)} s" if seconds < 600 else f"{number(seconds / 60)} min"


def size(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def operations(count: float) -> str:
    """A number of floating-point operations with its unit."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} TFLOP"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
