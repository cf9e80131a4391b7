"""What runs an action: one function a kind, to be found by its kind."""

from __future__ import annotations

import inspect

import pytest

from bpkit.plan import VERBS
from bpkit.run.engine import communication, compute
from bpkit.run.engine.context import RUNS


def test_every_kind_of_the_table_is_run_by_one_function():
    assert set(RUNS) == set(VERBS)


@pytest.mark.parametrize("kind", VERBS)
def test_compute_runs_in_one_file_and_communication_in_another(kind):
    verb = VERBS[kind]
    home = compute if verb.stream == "compute" else communication
    assert inspect.getmodule(RUNS[kind]) is home
    decorators = inspect.getsource(RUNS[kind]).split("def ")[0]
    assert f'"{kind}"' in decorators  # whoever looks for a kind finds its function by the text
