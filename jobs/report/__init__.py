"""Tables and pictures of finished runs: ``mpi-ef report``."""

from mpi_ef.moved import earlier

__all__: list[str] = []

__getattr__ = earlier(__name__, main="program", read_sections="program", Section="html")
