"""What exchanges take on clusters that are not at hand: ``mpi-ef scale``."""
