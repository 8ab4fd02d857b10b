"""Who is slow, on real ranks: a rank that sleeps is named. How long anything else takes decides nothing."""

import json
from pathlib import Path

import pytest
from launching import run
from patience import limit

PROGRAM = Path(__file__).parent / "slow_rank_program.py"


@pytest.mark.parametrize("how", ["plain", pytest.param("overlap", marks=pytest.mark.exhaustive)])
def test_a_rank_that_sleeps_is_named(how):
    """It sleeps in 9 of the 12 steps that count, the longer, the busier the machine is: so do the others then."""
    ended = run(3, PROGRAM, how, limit(0.2), within=60)
    assert ended.status == 0, ended.text
    said = json.loads(ended.lines_with("in_time")[0])
    assert said["in_time"] == [12, 12, 12]
    assert said["missing"] == [0, 0, 0]
    assert said["slow"] == [1]
    assert said["last"][1] >= 7
    assert said["median"][1] > 0.1
    assert said["lines"][0].startswith("rank 1 is last in ")
