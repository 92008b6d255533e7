"""Make text and numbers from models, data and records safe to show."""

import math
import unicodedata
from typing import Any


def visible(text: object, keep: str = "") -> str:
    """Text without invisible characters: control, bidi, zero-width and unpaired ones become ⟨U+202E⟩.

    keep: characters to leave unchanged.
    """
    hidden = {c for c in str(text) if not (c in keep or c.isprintable() or unicodedata.category(c) == "Zs")}
    return str(text).translate({ord(c): f"⟨U+{ord(c):04X}⟩" for c in hidden})


def clean(value: Any) -> Any:
    """A JSON value with every string in it made visible, keys too."""
    if isinstance(value, dict):
        return {visible(key): clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(clean, value))
    return visible(value) if isinstance(value, str) else value


def number(value: object, field: str) -> float | int:
    """The number, finite or not. Raises ValueError, naming the field, for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{field} is not a number: {visible(value)[:60]}")
    return value if isinstance(value, float) or abs(value) < 1e300 else math.inf


def short(value: object) -> str:
    """A number to read: 0.912, 12.3, 1,024, 2.0e-05, nan; "" for None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else visible(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if 0 < abs(value) < 0.001 or abs(value) >= 1e7:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def cell(text: str) -> str:
    """Text escaped for a Markdown table, so that it opens no cell and no HTML element."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
