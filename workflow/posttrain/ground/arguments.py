"""Numbers on the command line: types for argparse, which tell what was found and what is allowed."""

import argparse
import math


def whole(text: str) -> int:
    """A whole number of at least 0; an argparse type."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, it should be a whole number from 0")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 1; an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, it should be a whole number from 1")
    return int(text)


def amount(text: str, unit: str = "minutes") -> float:
    """A number of a unit, at least 0; an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, it should be a number of {unit} from 0")
    return number
