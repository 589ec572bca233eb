"""Numbers and names as a person reads them."""

from __future__ import annotations

import math
from typing import Any

from okdc.errors import counted

DASH = "–"  # what is not known


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def digits(value: Any) -> str:
    """Three significant digits, no exponent: 0.812, 6.08, 12.3, 1,480."""
    found = number(value)
    if found is None:
        return DASH
    places = 2 - math.floor(math.log10(abs(found))) if found else 0
    return f"{found:,.{min(max(places, 0), 6)}f}"


def si(value: Any) -> str:
    """A count with its SI prefix: 11.2 M."""
    found = number(value)
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if found is not None and abs(found) >= size:
            return f"{digits(found / size)}\u00a0{prefix}"
    return digits(found) if found is None or found % 1 else f"{found:.0f}"


def percent(value: Any, places: int = 1) -> str:
    """A percentage: 97.2 %."""
    found = number(value)
    return DASH if found is None else f"{found:.{places}f}\u00a0%"


def figure(value: Any, unit: str) -> str:
    """A score in its unit: 97.2 %, 4.1 px."""
    found = number(value)
    return DASH if found is None else f"{found:.1f}\u00a0{unit}"


def signed(value: Any, places: int = 2) -> str:
    """A difference in points: +1.40."""
    found = number(value)
    return DASH if found is None else f"{found:+.{places}f}".replace("-", "−")


def standard_error(value: Any, images: Any) -> float | None:
    """That of a percentage of so many images, in points: sqrt(p (1 - p) / n)."""
    found, count = number(value), number(images)
    return None if found is None or not count else math.sqrt(max(found * (100 - found), 0) / count)


def uncertain(value: Any, images: Any) -> str:
    """What stands behind a percentage: ` ± 0.9 on 360 images`, one standard error; nothing where it is not known."""
    error = standard_error(value, images)
    if error is None:
        return ""
    return (f" ± {error:.1f}" if error else "") + f" on {images:,} image{'s' * (images != 1)}"


def chance(now: Any, before: Any, images: Any) -> str | None:
    """What a difference between two percentages of the same images is worth, in words; None where one is missing."""
    new, old, count = number(now), number(before), number(images)
    if new is None or old is None or not count:
        return None
    differing, bound = round(abs(new - old) * count / 100), by_chance(new, old, count)
    return (
        f"The difference is {differing} of {images:,} images. Chance alone makes differences of up to ±{bound:.1f} "
        "points between two runs like these (95 %, reckoned as if each had images of its own)."
    )


def by_chance(now: float, before: float, images: float) -> float:
    """Points that two percentages of so many images each may differ by chance, 95 %.

    A. Agresti, B. Caffo, 2000: two images more of each run, one right and one wrong, so that 100 % is not certain.
    """
    shares = [(value * images / 100 + 1) / (images + 2) for value in (now, before)]
    return 196 * math.sqrt(sum(share * (1 - share) / (images + 2) for share in shares))


def tiny(value: Any) -> str:
    """An error between two logits: 1.2e-06."""
    found = number(value)
    return DASH if found is None else f"{found:.1e}" if found else "0"


def duration(seconds: Any) -> str:
    """Seconds in their two largest units: 1 min 13 s."""
    found = number(seconds)
    if found is None:
        return DASH
    minutes, rest = divmod(round(found), 60)
    if minutes == 0:
        return f"{found:.1f} s" if found < 10 else f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def epoch(index: Any) -> int | None:
    """The number of an epoch as people count: from 1."""
    return None if number(index) is None else int(index) + 1


def whole(value: Any) -> str:
    """A count: 12."""
    return DASH if number(value) is None else str(int(value))


def cell(value: Any) -> str:
    """Text that can neither leave its cell of a markdown table nor be read as markdown or html."""
    text = " ".join(str(value).split()) if value else ""
    return "".join(f"\\{char}" if char in "\\|`*_<[" else char for char in text) or DASH


FILTERS = {"counted": counted} | {
    f.__name__: f for f in (cell, digits, duration, epoch, figure, percent, si, signed, tiny, uncertain, whole)
}
