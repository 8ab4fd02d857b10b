"""Programs on top of mpi_ef: the only package that reads argv, the environment and COMM_WORLD."""
