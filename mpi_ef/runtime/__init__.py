"""Starting, stopping and surviving of MPI programs."""
