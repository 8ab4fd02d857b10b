"""Training a real model: ``mpi-ef train``."""

from mpi_ef.moved import earlier

__all__: list[str] = []

__getattr__ = earlier(__name__, main="program", train="program", TrainConfig="config", PHASES="config", PROOF="config",
                      FILES="config", learning_rate="config")
