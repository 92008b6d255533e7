"""Read the sources of `prepare`, local files and fetched data sets, and count their rows in the data card."""

from pathlib import Path

from posttrain.config.sections import Prepare, Source
from posttrain.data import overlap, rows
from posttrain.data.hub import find_manifest, local_dataset
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say


def read_source(section: Prepare, source: Source, task: str, cards: list[dict], fetched: list[Path]) -> list[dict]:
    """The canonical rows of a source without repeats. Prints what was dropped, and adds an entry to the data card.

    `fetched`: manifests of `fetch`, one of which lists the data set. Raises UserError where no row can be used.
    """
    options = {"group_key": section.group_key, "allow_empty_user": section.allow_empty_user}
    if source.path:
        limit = int(section.max_line_mb * 2**20)
        report = rows.read_file(source.path, task, source.format, max_line_bytes=limit, **options)
    else:
        name = "/".join(filter(None, (source.dataset, source.subset, source.rows)))
        report = rows.read_rows(hub_rows(source, fetched), name, task, source.format, **options)
    for sentence in report.describe():
        say(sentence)
    dropped = {reason: len(cases) for reason, cases in report.dropped.items()}
    warnings = {reason: len(cases) for reason, cases in report.warnings.items()}
    distinct, repeats = overlap.deduplicate(report.rows)
    cards.append(card(report.name, task, dropped | {"exact duplicate": repeats}, warnings, report.total, len(distinct)))
    if not report.rows:
        raise UserError(f"{report.name}: no row of {report.total} can be used", *report.describe()[:5])
    for row in distinct if source.separator else ():
        for key in ("completion", "chosen", "rejected"):
            if isinstance(row.get(key), str):
                row[key] = source.separator + row[key]
    return distinct


def hub_rows(source: Source, fetched: list[Path]):
    """The rows of a fetched data set, as `datasets` loads them. Raises UserError for a subset or split it lacks."""
    import datasets

    assert source.dataset, "the source is a data set on the hub"
    manifest = find_manifest(fetched, "dataset", source.dataset, source.revision)
    folder = local_dataset(source.dataset, source.revision or "main", manifest)
    try:
        return datasets.load_dataset(str(folder), source.subset, split=source.rows)
    except ValueError as error:
        raise UserError(f"prepare: data set {source.dataset}: {str(error).splitlines()[0]}") from None


def card(name: str, task: str, dropped: dict, warnings: dict | None = None, total: int = 0, kept: int = 0) -> dict:
    """One entry of the data card; counts of zero are left out."""
    return {
        "name": name,
        "task": task,
        "total": total,
        "kept": kept,
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "warnings": warnings or {},
    }
