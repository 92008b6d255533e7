"""Record which keys of its section a stage reads; a key that is never read has no effect."""

from posttrain.config.sections import Section


class Watched:
    """A section that adds each dotted key that is read from it to the set `read`."""

    def __init__(self, section: Section, read: set[str], prefix: str = ""):
        self.__dict__.update(_section=section, _read=read, _prefix=prefix)

    @property  # type: ignore[misc]  # so that `isinstance` sees the section
    def __class__(self):
        return type(self._section)

    def __getattr__(self, key: str):
        section, read, prefix = (self.__dict__[name] for name in ("_section", "_read", "_prefix"))
        if key not in type(section).model_fields:
            if key in ("model_dump", "model_copy"):  # taken as a whole
                read.update(f"{prefix}{name}" for name in type(section).model_fields)
            return getattr(section, key)
        read.add(f"{prefix}{key}")
        value = getattr(section, key)
        if isinstance(value, Section):
            return Watched(value, read, f"{prefix}{key}.")
        if isinstance(value, list) and value and isinstance(value[0], Section):
            return [Watched(item, read, f"{prefix}{key}.") for item in value]
        return value

    def __eq__(self, other):
        return self._section == getattr(other, "_section", other)

    def __hash__(self):
        return id(self)


def unread(slice: dict, read: set[str], prefix: str = "") -> list[str]:
    """The dotted keys of a section's slice that were not read; for an unread section within it, only its key."""
    keys = []
    for key, value in slice.items():
        if f"{prefix}{key}" not in read:
            keys.append(f"{prefix}{key}")
        elif isinstance(value, dict):
            keys += unread(value, read, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            keys += [name for item in value for name in unread(item, read, f"{prefix}{key}.")]
    return sorted(set(keys))
