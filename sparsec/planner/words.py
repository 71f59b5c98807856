"""Figures as a person reads them: times, sizes, rates.

This file decides units and digits, nothing else.
"""

from __future__ import annotations


def duration(us: float) -> str:
    """Microseconds as a person reads them."""
    # Three digits; 999.6 of a unit are 1 of the next.
    if us >= 999.5e6:
        return f"{us / 1e6:,.0f} s"
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if us >= 0.9995 * scale:
            return f"{us / scale:.3g} {unit}"
    return f"{us:.3g} µs"


def size(n_bytes: int) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            value = n_bytes / scale
            return f"{value:,.0f} {unit}" if value >= 999.5 else f"{value:.3g} {unit}"
    return f"{n_bytes} bytes"


def rate(gflops: float) -> str:
    """GFLOP/s as a person reads them."""
    return f"{gflops / 1e3:,.0f} TFLOP/s" if gflops >= 1e4 else f"{gflops:,.0f} GFLOP/s"


def percent(share: float) -> str:
    """A share in whole percents; what is there is not told as nothing."""
    return "<1%" if 0.0 < share < 0.005 else f"{share:.0%}"
