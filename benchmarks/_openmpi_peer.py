"""The Open MPI side of ``collectives.py``: run under mpirun, it obeys lines ``elements repetitions``.

Each rank reads its own pipe, so that an idle rank sleeps instead of spinning in MPI while others measure.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from mpi4py import MPI


def main(folder: str) -> None:
    comm = MPI.COMM_WORLD
    buffers: dict[int, np.ndarray] = {}
    answers = open(f"{folder}/answer", "w") if comm.rank == 0 else None  # noqa: SIM115
    with open(f"{folder}/command{comm.rank}") as commands:
        for line in commands:
            n, repetitions = map(int, line.split())
            buffer = buffers.setdefault(n, np.full(n, 0.0, np.float32))
            comm.Allreduce(MPI.IN_PLACE, buffer)
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(repetitions):
                comm.Allreduce(MPI.IN_PLACE, buffer)
            seconds = (time.perf_counter() - start) / repetitions
            if answers is not None:
                print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
