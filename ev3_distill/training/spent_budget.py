"""spent.json: what the tests on decide have spent, on disk before anything follows from their answers.

A run whose budget is a wall time cannot repeat its iterations: after a kill it continues from its newest checkpoint, with
other trajectories and other candidates. Without this record, tests made since that checkpoint would be free. They would be
further tests at levels that had been spent already. So each test is recorded at once, and a resumed run continues with the
error budget that the last test left, whatever its checkpoint says. A run whose budget is a number of steps repeats the same
iterations bit by bit, and with them the same tests; it needs no record.
"""

from pathlib import Path

import jax.numpy as jnp

from ev3_distill.runtime.files import sync_directory
from ev3_distill.training.run_dir import read_json, write_json
from ev3_distill.types import ErrorBudget, State

NAME = "spent.json"


def record(directory: Path, budget: ErrorBudget) -> None:
    """Writes what a test left; on disk on return."""
    content = {"tests": int(budget.tests), "promotions": int(budget.promotions), "left": float(budget.left)}
    write_json(directory / NAME, content)
    sync_directory(directory)


def charge(directory: Path, state: State) -> State:
    """The state of a checkpoint, charged with the tests that were made after it.

    Raises:
      InputError: the record is damaged.
    """
    path = directory / NAME
    if not path.exists():
        return state
    spent = read_json(path)
    if spent["tests"] <= int(state.budget.tests):
        return state
    budget = ErrorBudget(jnp.int32(spent["tests"]), jnp.int32(spent["promotions"]), jnp.float32(spent["left"]))
    return state._replace(budget=budget)
