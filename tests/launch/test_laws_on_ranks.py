"""The tests in tests/mpi under a launcher: laws on real ranks, and what only they show."""

import sys
from pathlib import Path

import launching
import pytest

from mpi_ef.comm.nodes import RANKS_PER_NODE

FOLDER = Path(__file__).parents[1] / "mpi"
SELDOM = 3 if Path(sys.prefix).name == "mpich" else 4  # the gate has these ranks with the other MPI; see the Makefile


def laws(n, selected, **environment):
    """A rank in which a test fails ends all of them; conftest.py also fails runs in which a test was skipped."""
    ended = launching.run(n, "-m", "pytest", "-q", "--color=no", "--durations=25", "-p", "no:cacheprovider", "--with-mpi",
                          "-p", "mpi_ef.testing.plugin", "--real-ranks", "-m", selected, FOLDER, within=600,
                          MPI_EF_TEST_RANKS=str(n), **environment)
    print(ended.text)
    assert ended.status == 0, ended.text
    assert " passed" in ended.text


@pytest.mark.timeout(900)
@pytest.mark.parametrize("n", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n == SELDOM)) for n in (4, 3, 2, 1)])
def test_on_real_ranks(n, pytestconfig):
    laws(n, pytestconfig.option.markexpr)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("n", "each"), [(5, ""), (6, ""), (5, "2"), (6, "4")])
def test_on_more_ranks_and_nodes_of_different_size(n, each):
    laws(n, "not exhaustive", **{RANKS_PER_NODE: each})
