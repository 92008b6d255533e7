"""Rows that are equal, nearly equal, or judge the same in another way, by the numbers of stored rows."""

from collections.abc import Iterator

import numpy as np

from posttrain.data.stored import Rows, first_with


def without_repeats(rows: Rows) -> tuple[Rows, Iterator[tuple[dict, dict]]]:
    """(rows without exact repeats of earlier content, the repeats, each with the earlier row)."""
    (exact,) = rows.numbers("exact")
    first = first_with(exact)
    own = np.arange(len(rows))
    return rows.take(np.flatnonzero(first == own)), pairs(rows, np.flatnonzero(first != own), first)


def near_duplicates(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(places of rows that differ from an earlier one only in case, space and sentence punctuation, for each row the
    place of the first such)."""
    near, exact = rows.numbers("near", "exact")
    first = first_with(near)
    return np.flatnonzero(exact != exact[first]), first


def contradictions(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(places of rows that judge the same as an earlier one with another verdict, for each row the place of the first
    such): see `texts.fingerprints`."""
    judged, verdict = rows.numbers("judged", "verdict")
    first = first_with(judged)
    return np.flatnonzero((judged != 0) & (verdict != verdict[first])), first


def pairs(rows: Rows, places: np.ndarray, first: np.ndarray) -> Iterator[tuple[dict, dict]]:
    """(row, first row) for each of the places."""
    return ((rows[int(place)], rows[int(first[place])]) for place in places)
