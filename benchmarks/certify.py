"""The resume certificate: every trainer, killed by SIGKILL several times, ends in the bytes of an uninterrupted run.

python benchmarks/certify.py [--kills N] [--stage STAGE ...] [--seed S] [--folder F]    # 200 kills over all trainers

Half of the kills are aimed at a save, a tenth at any moment since the process started, the rest at training. A run is
killed up to nine times before it may end. Controls: continued without a piece of its state, a run ends in other bytes.
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

STEPS = {"base": 500, "ppo": 30}  # steps of a run; 150 for the other trainers
SAVES = 0.25 / 60  # minutes between checkpoints


def main() -> int:
    """Print the tables; returns 1 where a digest differs or a control's does not."""
    arguments = arguments_of_command().parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as unnamed:
        folder = arguments.folder or Path(unnamed)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder.absolute())  # deleted with the folder: what killed processes leave
        killing.prepare()
        read_by = make_inputs(arguments.stage)
        print(f"seed {arguments.seed}; one CPU thread; {time.strftime('%Y-%m-%d')}\n")
        print("| trainer | runs | kills | in training | in a save | loading, ending | equal digests |")
        print("|---|---|---|---|---|---|---|", flush=True)
        share = -(-arguments.kills // len(arguments.stage))
        good = all([certify(stage, read_by[stage], share, arguments.seed) for stage in arguments.stage])
        print("\n| trainer | continued without | digest |\n|---|---|---|", flush=True)
        return 0 if all([check_controls(stage, read_by[stage]) for stage in arguments.stage]) and good else 1


def arguments_of_command() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="total (default 200)")
    parser.add_argument("--stage", nargs="+", choices=tiny.READ_BY, default=list(tiny.READ_BY))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    return parser


def section(stage: str):
    """A trainer's settings: with all state that a resume could lose, saved by the clock."""
    return tiny.trainers(steps=STEPS.get(stage, 150), checkpoint_minutes=SAVES)[stage]


def make_inputs(stages: list[str]) -> dict[str, dict[str, Path]]:
    """Make the artifacts that the trainers read; returns trainer -> role -> manifest."""
    paths: dict[str, Path] = {}
    for name, (stage, settings, roles) in tiny.chain().items():
        paths[name] = Path(name, stage, "manifest.json")
        killing.finish(stage, settings, paths[name], {role: paths[other] for role, other in roles.items()})
    return {stage: {role: paths[name] for role, name in tiny.READ_BY[stage].items()} for stage in stages}


def certify(stage: str, inputs: dict[str, Path], kills: int, seed: int) -> bool:
    """Kill a trainer `kills` times, over several runs, and print its line; returns whether all bytes are equal."""
    whole = killing.finish(stage, section(stage), Path("whole", stage, "manifest.json"), inputs)
    rng, hits, runs, equal = random.Random(f"{seed}:{stage}"), dict.fromkeys(killing.AIMS, 0), 0, 0
    while sum(hits.values()) < kills:
        output = Path(f"killed-{runs}", stage, "manifest.json")
        for _ in range(min(rng.randint(3, 9), kills - sum(hits.values()))):
            aim = rng.choices(killing.AIMS, weights=(4, 5, 1))[0]
            hit = killing.kill(stage, section(stage), output, inputs, aim, rng, seconds=1.0)
            if not hit:
                break
            hits[hit] += 1
        digests = killing.finish(stage, section(stage), output, inputs)
        runs, equal = runs + 1, equal + (digests == whole)
    by_aim = " | ".join(str(count) for count in hits.values())
    print(f"| {stage} | {runs} | {sum(hits.values())} | {by_aim} | {equal} of {runs} |", flush=True)
    return equal == runs


def check_controls(stage: str, inputs: dict[str, Path]) -> bool:
    """Continue without one piece of the state, each in turn, and print a line for each; returns whether all differ."""
    whole, good = killing.read_json(Path("whole", stage, "manifest.json"))["files"], True
    for piece in killing.PIECES[stage]:
        output = Path(f"without {piece}", stage, "manifest.json")
        differs = killing.continue_without(piece, stage, section(stage), output, inputs) != whole
        good = good and differs
        print(f"| {stage} | {piece} | {'another' if differs else 'THE SAME'} |", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
