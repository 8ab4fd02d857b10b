"""For tests of one's own compressors and rules: ranks without MPI, and the laws that those built in obey.

::

    from mpi_ef.testing import CompressorLaws

    class TestMine(CompressorLaws):  # pytest finds the laws in it
        compressor = MyCompressor(3)
"""

from .compressor_laws import CompressorLaws
from .rule_laws import RuleLaws
from .virtual import VirtualComm, results, run

__all__ = ["CompressorLaws", "RuleLaws", "VirtualComm", "results", "run"]
