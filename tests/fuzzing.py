"""Make single mistakes in valid campaigns, chosen from a seed, and judge what `posttrain check` says about each.

python tests/fuzzing.py --seed 0 --count 1000
"""

import argparse
import os
import re
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from mutations import CHILDREN, KINDS, OVERRIDES, SITE, Fuzzer, Mistake
from valid_campaigns import project

from posttrain.cluster import sites
from posttrain.dag import campaign
from posttrain.ground.errors import UserError


def messages(folder: Path, mistake: Mistake) -> list[str] | None:
    """What `posttrain check` says about a campaign in a folder, or its site; None where it accepts them. Any other
    exception is a traceback for the user."""
    for name, content in mistake.files.items():
        if name != OVERRIDES:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems = []
    for read in (
        lambda: campaign.load(folder / "config.yaml", mistake.files.get(OVERRIDES)),
        lambda: sites.read(folder / SITE),
    ):
        try:
            read()
        except UserError as error:
            problems += error.problems
    for name in mistake.files:
        (folder / name).unlink(missing_ok=True)
    return problems or None


RAW = re.compile(r"found (True|False|None)\b|\^\[|Traceback|pydantic|\bdict\b|NoneType|\binput\b|\binstance\b")


def judged(folder: Path, mistake: Mistake) -> tuple[str, list[str]]:
    """("" or what is wrong with the answer to a mistake, the answer)."""
    try:
        said = messages(folder, mistake)
    except Exception:
        return "traceback", traceback.format_exc().splitlines()
    if said is None:
        return ("accepted" if mistake.forbidden else ""), []
    if len(said) > 1 and not mistake.several:
        return "further messages", said
    if any(RAW.search(message) for message in said):
        return "words of Python", said
    where = OVERRIDES if mistake.file == OVERRIDES else f"{folder / mistake.file}:{mistake.line or ''}"
    start = re.escape(f"{where}: {mistake.key}" if mistake.line or mistake.file == OVERRIDES else where)
    item = rf"|{re.escape(str(folder / mistake.file))}:\d+: {re.escape(mistake.key)}\["  # an item is in another line
    if mistake.key and mistake.forbidden and not any(re.match(start + item, message) for message in said):
        return "wrong place", [f"expected: {start}", *said]
    innocent = [folder / name for name in mistake.files if name != mistake.file and mistake.file in CHILDREN]
    if any(message.startswith(f"{file}:") for file in innocent for message in said):
        return "wrong file", said
    if not all(re.match(rf"{OVERRIDES}|{re.escape(str(folder))}/\S+:\d+: ", message) for message in said):
        return "no place", said
    return "", said


def survey(seed: int, count: int, kind: str | None = None) -> list[tuple[Mistake, str, list[str]]]:
    """Mistakes, what is wrong with each answer, and the answers."""
    fuzzer = Fuzzer(seed)
    with tempfile.TemporaryDirectory() as name, project(Path(name)) as folder:
        return [(mistake, *judged(folder, mistake)) for mistake in (fuzzer.mistake(kind) for _ in range(count))]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--kind", choices=sorted(KINDS))
    options.add_argument("--show", type=int, default=3, help="answers to show of each fault")
    arguments = options.parse_args()
    before = os.times()
    surveyed = survey(arguments.seed, arguments.count, arguments.kind)
    spent = sum(os.times()[:2]) - sum(before[:2])
    faults = Counter((fault, mistake.kind) for mistake, fault, _ in surveyed if fault)
    for (fault, kind), number in sorted(faults.items()):
        print(f"{fault:18} {kind:18} {number}")
    shown: Counter = Counter()
    for mistake, fault, said in surveyed:
        if fault and shown[fault, mistake.kind] < arguments.show:
            shown[fault, mistake.kind] += 1
            print(f"\n== {fault}: {mistake.kind} {mistake.file}:{mistake.line} {mistake.key}")
            print("\n".join(line[:300] for line in said[-12:]))
    print(f"\n{sum(faults.values())} faults in {len(surveyed)} mistakes, {spent:.1f} CPU seconds")
    print(dict(Counter(fault for _, fault, _ in surveyed)))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
