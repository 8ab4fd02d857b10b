"""What goes wrong before the first step: ``mpi-ef doctor``."""

from mpi_ef.moved import earlier

__all__: list[str] = []

__getattr__ = earlier(__name__, main="program", DoctorConfig="registry", Report="report")
