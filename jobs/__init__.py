"""Programs on top of mpi_ef: the only room that looks at argv, the environment and COMM_WORLD."""
