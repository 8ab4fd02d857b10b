"""What is asked of a communicator, and ranks that agree."""
