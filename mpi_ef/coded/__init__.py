"""Coded computing: redundant work, so that what is asked for is there although some workers are late, lost or wrong."""

from .berrut import BerrutCode, Decoded, Decoding
from .locator import Parity, locate

__all__ = ["BerrutCode", "Decoded", "Decoding", "Parity", "locate"]
