"""Tests for calling a function in several processes."""

import pytest

from senet_transfer.utils.parallel import run_parallel


def power(base: int, exponent: int) -> int:
    return base**exponent


@pytest.mark.long
@pytest.mark.parametrize("tasks", [range(20), [3], []])
def test_the_results_equal_those_in_one_process_for_any_number_of_tasks(tasks):
    found = dict(run_parallel(power, tasks, 3, workers=2))
    assert found == {base: base**3 for base in tasks}
