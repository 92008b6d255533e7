"""Which keys of its section a stage read: one that is never read is a setting without effect."""

from posttrain.config.sections import Section


class Watched:
    """A section that remembers, in `read`, the dotted keys that were asked of it."""

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
    """The dotted keys of a section's slice that were not read; of a section that was not read, itself alone."""
    found = []
    for key, value in slice.items():
        if f"{prefix}{key}" not in read:
            found.append(f"{prefix}{key}")
        elif isinstance(value, dict):
            found += unread(value, read, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found += [name for item in value for name in unread(item, read, f"{prefix}{key}.")]
    return sorted(set(found))
