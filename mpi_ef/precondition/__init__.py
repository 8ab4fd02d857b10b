"""Second order: gradients multiplied by inverses of small matrices, learned from vectors that ranks exchange."""

from .layers import LayerReport
from .preconditioner import Preconditioner

__all__ = ["LayerReport", "Preconditioner"]
