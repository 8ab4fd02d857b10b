"""For tests of one's own compressors, rules, plans and optimizers: ranks without MPI, faults, the laws of those built in.

::

    from mpi_ef.testing import CompressorLaws

    class TestMine(CompressorLaws):  # pytest finds the laws in it
        compressor = MyCompressor(3)
"""

from typing import TYPE_CHECKING, Any

from .compressor_laws import CompressorLaws
from .faults import FaultyComm
from .plan_laws import PlanLaws
from .rule_laws import RuleLaws
from .virtual import VirtualComm, results, run

if TYPE_CHECKING:
    from .optimizer_laws import OptimizerLaws

__all__ = ["CompressorLaws", "FaultyComm", "OptimizerLaws", "PlanLaws", "RuleLaws", "VirtualComm", "results", "run"]


def __getattr__(name: str) -> Any:
    if name != "OptimizerLaws":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .optimizer_laws import OptimizerLaws  # which wants torch

    return OptimizerLaws
