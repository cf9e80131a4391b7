"""What the checker costs: seconds to make, to check and to compare with the number of actions of all ranks.

python benchmarks/checker.py
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import bpkit as bp
from bpkit.plan import Plan, data_parallel, expand, one_f_one_b, tensor_parallel, zero
from bpkit.plan.checker.check import order
from bpkit.plan.liveness import waits_by_row

REPEATS = 5


def plans() -> dict[str, Callable[[], Plan]]:
    """What is checked, by name."""
    layout = bp.nn.tensor_layout(bp.nn.gpt(16, 16, width=16, heads=4, layers=4))
    return {
        "data_parallel(64, 4)": lambda: data_parallel(64, 4),
        "zero(64, 3, units=4)": lambda: zero(64, 3, units=4),
        "a ring of 64": lambda: expand(data_parallel(64, 1), "ring"),
        "1F1B(32, 64)": lambda: one_f_one_b(32, 64),
        "4 x 4 x 4": lambda: tensor_parallel(one_f_one_b(4, 8, data=4), 4, layout),
        "1F1B(64, 256)": lambda: one_f_one_b(64, 256),
    }


def best(run: Callable[[], object]) -> float:
    """The shortest time of a few runs: what others on the machine take is not the checker's."""
    times = []
    for _ in range(REPEATS):
        order.cache_clear()
        waits_by_row.cache_clear()
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)


def main() -> None:
    """Print the table."""
    print(f"{'plan':<24}{'actions':>10}{'made s':>10}{'checked s':>10}{'us an action':>14}")
    for name, make in plans().items():
        plan = make()
        actions = sum(len(plan.row(at)) for at in plan.mesh.coordinates())
        made, checked = best(make), best(lambda plan=plan: order(plan))  # type: ignore[misc]
        print(f"{name:<24}{actions:>10,}{made:>10.3f}{checked:>10.3f}{checked / actions * 1e6:>14.1f}", flush=True)


if __name__ == "__main__":
    main()
