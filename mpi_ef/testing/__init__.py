"""For tests of one's own compressors, rules, plans and optimizers: ranks without MPI, faults, the laws of those built in.

::

    from mpi_ef.testing import CompressorLaws

    class TestMine(CompressorLaws):  # pytest finds the laws in it
        compressor = MyCompressor(3)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compressor_laws import CompressorLaws
    from .faults import FaultyComm
    from .optimizer_laws import OptimizerLaws
    from .plan_laws import PlanLaws
    from .rule_laws import RuleLaws
    from .virtual import VirtualComm, results, run

__all__ = ["CompressorLaws", "FaultyComm", "OptimizerLaws", "PlanLaws", "RuleLaws", "VirtualComm", "results", "run"]

_HOME = {
    "CompressorLaws": "compressor_laws",
    "FaultyComm": "faults",
    "OptimizerLaws": "optimizer_laws",
    "PlanLaws": "plan_laws",
    "RuleLaws": "rule_laws",
    "VirtualComm": "virtual",
    "results": "virtual",
    "run": "virtual",
}


def __getattr__(name: str) -> Any:
    """Load what is wanted: the plugin for pytest, which every run of it loads, wants nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
