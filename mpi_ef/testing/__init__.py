"""For tests of your own compressors, rules, plans and optimizers: ranks without MPI, faults, the laws of those built in.

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

_HOME = {name: module for module, names in {
    "compressor_laws": "CompressorLaws",
    "faults": "FaultyComm",
    "optimizer_laws": "OptimizerLaws",
    "plan_laws": "PlanLaws",
    "rule_laws": "RuleLaws",
    "virtual": "VirtualComm results run",
}.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Load a name at its first use: the plugin, which every run of pytest loads, needs none."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
