"""Published experiments, run again: ``mpi-ef reproduce``."""

from mpi_ef.moved import earlier

__all__: list[str] = []

__getattr__ = earlier(__name__, main="program", EXPERIMENTS="program", Experiment="program", Outcome="outcome",
                      ReproduceConfig="outcome")
