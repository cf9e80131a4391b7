"""Random mutants of plans against the checker, and random correct plans: what is accepted must be right when it is run.

python tools/mutants.py [--count N] [--seed S] [--transport shm|gloo|both] [--minutes M] [--timeout T]
    [--correct]
"""

import argparse
import random
import sys
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

BATCH = 50  # mutants of a plan at a time


def main() -> int:
    """Make and judge plans until there are enough, or the time is over; 1 if one was missed."""
    from tests.run.mutants import Judge, originals

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="plans in all; a transport is given no mutant twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", choices=("shm", "gloo", "both"), default="both")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds after which a run counts as hung")
    parser.add_argument("--correct", action="store_true", help="random correct plans in place of mutants")
    given = parser.parse_args()
    draw, plans, ends = random.Random(given.seed), originals(), time.monotonic() + 60 * given.minutes
    backends = ("shm", "gloo") if given.transport == "both" else (given.transport,)
    judges = [Judge(name, given.timeout) for name in backends]
    made = shown = 0
    for judge, plan in zip(cycle(judges), (draw.choice(plans) for _ in iter(int, 1)), strict=False):
        number = min(BATCH, given.count - made)
        if number <= 0 or time.monotonic() > ends:
            break
        judge.of_correct(draw, number) if given.correct else judge.of_mutants(plan, draw, number)
        made += number
        for text in judge.missed:
            print(f"missed on {text}\n", flush=True)
        shown += len(judge.missed)
        judge.missed.clear()
        if made // 1000 > (made - number) // 1000:
            print(made, dict(sum((j.counts for j in judges), Counter[str]())), flush=True)
    for judge in judges:
        judge.close()
        print(f"{judge.backend}: {dict(judge.counts)}")
    print(f"{made} plans, seed {given.seed}: {shown} missed")
    return min(shown, 1)


if __name__ == "__main__":
    raise SystemExit(main())
