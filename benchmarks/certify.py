"""The resume certificate: every trainer, killed with SIGKILL again and again, comes to the bytes of the whole run.

python benchmarks/certify.py [--kills N] [--stage STAGE ...] [--seed S] [--folder F]    # default: 200 in all trainers

Half of the kills are aimed at a save, a tenth at any moment from the process's start. A run is killed up to nine times
before it may end. Then the controls: a run that continues without a piece of its state must come to other bytes.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import killing
import tiny

STEPS = {"base": 500, "ppo": 30}  # of the certified runs; of the others 150
SAVES = 0.25 / 60  # minutes between their checkpoints


def main() -> int:
    """Print the tables; 1 where a digest differs or a control does not."""
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as unnamed:
        folder = arguments.folder or Path(unnamed)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder.absolute())  # what a killed process leaves goes with the rest
        killing.prepare()
        read_by = made(arguments.stage)
        print(f"seed {arguments.seed}; one CPU thread; {time.strftime('%Y-%m-%d')}\n")
        print("| trainer | runs | kills | in training | in a save | loading, ending | equal digests |")
        print("|---|---|---|---|---|---|---|", flush=True)
        share = -(-arguments.kills // len(arguments.stage))
        good = all([certified(stage, read_by[stage], share, arguments.seed) for stage in arguments.stage])
        print("\n| trainer | continued without | digest |\n|---|---|---|", flush=True)
        return 0 if all([controlled(stage, read_by[stage]) for stage in arguments.stage]) and good else 1


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--kills", type=int, default=200, help="in all (default 200)")
    found.add_argument("--stage", nargs="+", choices=tiny.READ_BY, default=list(tiny.READ_BY))
    found.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    found.add_argument("--folder", type=Path, help="where to work (default: a folder that is deleted)")
    return found


def section(stage: str):
    """What is trained: all that a resume could lose, saved by the clock."""
    return tiny.trainers(steps=STEPS.get(stage, 150), checkpoint_minutes=SAVES)[stage]


def made(stages: list[str]) -> dict[str, dict[str, Path]]:
    """Make what the trainers begin with; returns their inputs by role."""
    paths: dict[str, Path] = {}
    for name, (stage, settings, roles) in tiny.chain().items():
        paths[name] = Path(name, stage, "manifest.json")
        killing.finish(stage, settings, paths[name], {role: paths[other] for role, other in roles.items()})
    return {stage: {role: paths[name] for role, name in tiny.READ_BY[stage].items()} for stage in stages}


def certified(stage: str, inputs: dict[str, Path], kills: int, seed: int) -> bool:
    """Kill a trainer so often, over some runs, and print its line."""
    whole = killing.finish(stage, section(stage), Path("whole", stage, "manifest.json"), inputs)
    chance, where, runs, equal = random.Random(f"{seed}:{stage}"), dict.fromkeys(killing.AIMS, 0), 0, 0
    while sum(where.values()) < kills:
        output = Path(f"killed-{runs}", stage, "manifest.json")
        for _ in range(min(chance.randint(3, 9), kills - sum(where.values()))):
            aim = chance.choices(killing.AIMS, weights=(4, 5, 1))[0]
            hit = killing.kill(stage, section(stage), output, inputs, aim, chance, seconds=1.0)
            if not hit:
                break
            where[hit] += 1
        found = killing.finish(stage, section(stage), output, inputs)
        runs, equal = runs + 1, equal + (found == whole)
    told = " | ".join(str(count) for count in where.values())
    print(f"| {stage} | {runs} | {sum(where.values())} | {told} | {equal} of {runs} |", flush=True)
    return equal == runs


def controlled(stage: str, inputs: dict[str, Path]) -> bool:
    """Continue without one piece of the state, each in turn, and print a line for each."""
    whole, good = killing.read_json(Path("whole", stage, "manifest.json"))["files"], True
    for piece in killing.PIECES[stage]:
        output = Path(f"without {piece}", stage, "manifest.json")
        differs = killing.continue_without(piece, stage, section(stage), output, inputs) != whole
        good = good and differs
        print(f"| {stage} | {piece} | {'another' if differs else 'THE SAME'} |", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
