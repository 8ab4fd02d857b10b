"""Measuring on this machine: ``mpi-ef bench``."""

from mpi_ef.moved import earlier

__all__: list[str] = []

__getattr__ = earlier(__name__, main="program", BenchConfig="program", measure="program")
