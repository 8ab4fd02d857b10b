"""The kernels for vectors in the memory of a device: torch and Triton; the only folder of this room that imports them."""
