"""Training loops of others with this package's optimizers: Hugging Face `Trainer`, `accelerate`, Lightning.

Each rank is a program of one process to them; what communicates is this package. None of them is needed, and importing this
package imports none.
"""

from typing import TYPE_CHECKING, Any

from .accelerate import prepare_accelerator
from .processes import one_process
from .transformers import prepare_trainer

if TYPE_CHECKING:
    from .lightning import MpiStrategy

__all__ = ["MpiStrategy", "one_process", "prepare_accelerator", "prepare_trainer"]


def __getattr__(name: str) -> Any:
    if name != "MpiStrategy":
        raise AttributeError(f"module 'mpi_ef.integrations' has no attribute {name!r}")
    from .lightning import MpiStrategy

    return MpiStrategy
