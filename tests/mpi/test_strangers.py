"""The laws for users' own things on real ranks, as `pytest --real-ranks` runs them."""

import os

import pytest
from my_compressor import BlockMax
from my_optimizer import Normalized

from mpi_ef.testing import CompressorLaws, OptimizerLaws, PlanLaws, RuleLaws, VirtualComm, results

pytestmark = [pytest.mark.mpi, *[pytest.mark.exhaustive] * (os.environ.get("MPI_EF_TEST_RANKS") != "2")]


@pytest.fixture
def comm():
    from mpi4py import MPI

    return MPI.COMM_WORLD


class TestMyCompressor(CompressorLaws):
    compressor = BlockMax(3)


class TestMyRule(RuleLaws):
    rule = "my_rule:FADING(fade=0.5)"
    follows = 0


class TestMyPlan(PlanLaws):
    plan = "my_plan:TrimmedMean(trim=0)"


class TestMyOptimizer(OptimizerLaws):
    optimizer = Normalized


def test_ranks_are_real_where_there_are_so_many(comm):
    assert results(comm.size, lambda comm: type(comm).__module__) == ["mpi4py.MPI"] * comm.size
    assert results(comm.size + 1, type) == [VirtualComm] * (comm.size + 1)
    assert results(comm.size, lambda comm: comm.rank) == [*range(comm.size)]
