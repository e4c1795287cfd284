"""Refusing a bad number in one sentence that names it."""

import math


def require_int(name: str, value: object, low: int, high: int) -> None:
    """TypeError or ValueError with one sentence, unless value is a whole number from low to high."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, but must be a whole number from {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must be a whole number from {low} to {high}")


def require_positive(name: str, value: float) -> None:
    """ValueError with one sentence, unless value is positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}, but must be positive and finite")
