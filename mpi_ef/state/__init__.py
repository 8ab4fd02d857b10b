"""What a training saves, and what another number of ranks makes of it."""
