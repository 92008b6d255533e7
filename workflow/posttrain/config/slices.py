"""The part of a section that has an effect: what a stage is given, and what its artifact's identity counts."""

from collections.abc import Iterator
from operator import itemgetter

from posttrain.config.sections import Section, conditional


def inapplicable(section: Section) -> Iterator[tuple[str, str]]:
    """Keys of a section that have no effect under its other settings, each with the reason."""
    for key, condition in conditional(type(section)).items():
        for other, allowed in condition.items():
            value = getattr(section, other)
            if value not in allowed:
                yield key, f"has no effect with {other}: {value} (only with {' or '.join(allowed)})"


def slice_of(section: Section) -> dict:
    """A section as plain values, without the keys that have no effect and without those that are unset."""
    useless = {key for key, _ in inapplicable(section)}
    values = {}
    for key, value in sorted(section, key=itemgetter(0)):
        if key in useless:
            continue
        if isinstance(value, list):
            values[key] = [slice_of(item) if isinstance(item, Section) else item for item in value]
        elif value is not None:
            values[key] = slice_of(value) if isinstance(value, Section) else value
    return values
