"""What every test of an exercise asks of its check."""

from __future__ import annotations

import time
from typing import Any

import bpkit as bp


def rejected(name: str, answer: Any, says: str) -> None:
    """A wrong answer is refused in time, in one sentence that names the fault."""
    start = time.monotonic()
    verdict = bp.exercises.check(name, answer)
    assert time.monotonic() - start < 10
    assert not verdict.passed and says in verdict.sentence, verdict
    assert "\n" not in repr(verdict)
