"""EF21-Muon: steps of fixed length in the spectral norm, along an estimate of the gradient's momentum."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mpi_ef.collectives import PlanBuilder, plan_for
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor

from .groups import parameters_of
from .wrapper import DistributedOptimizer

__all__ = ["EF21Muon", "LinearMinimization", "orthogonalized"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic that lifts singular values in (0, 1] to about 1 in five rounds
_ROUNDS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return about U V^T of the decomposition U S V^T of a (p, q) float tensor, by five Newton-Schulz rounds. Local.

    Zero stays zero. Jordan et al. 2024 (Muon). Singular values end between about 0.7 and 1.2; those below a thousandth of
    the norm less.
    Computed in the dtype of the matrix, with matrix products: equal bits on equal machines only.
    """
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if matrix.shape[0] > matrix.shape[1] else x
    return result


class LinearMinimization(Optimizer):
    """Step to the minimum of the linearised loss in a ball: of the spectral norm for matrices, of the largest entry else.

    ``x = (1 - lr weight_decay) x - lr * radius * LMO(grad)``: U V^T with radius ``sqrt(max(1, p / q))`` for a (p, q) matrix
    (further dimensions are columns), sign(grad) with radius `vector_radius` for vectors.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float, vector_radius: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "vector_radius": vector_radius})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take the step. Local."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                if p.dim() < 2:
                    p.sub_(p.grad.sign(), alpha=group["lr"] * group["vector_radius"])
                else:
                    grad = p.grad.flatten(1)
                    radius = max(1.0, grad.shape[0] / max(1, grad.shape[1])) ** 0.5
                    p.sub_(orthogonalized(grad).reshape(p.shape), alpha=group["lr"] * radius)


class EF21Muon(DistributedOptimizer):
    """EF21-Muon (Gruntkowska et al. 2025, arXiv 2510.00643): Muon on an EF21 estimate of the momentum.

    ``v_i = (1 - beta) v_i + beta grad_i``, at first grad_i, of which EF21 sends the differences
    (:func:`mpi_ef.feedback.momentum.ef21_sgdm`); the mean estimate decides the step, see :class:`LinearMinimization`. All
    ranks compute the step themselves, so the model need not travel; ``plan=TwoPhaseMean`` and ``rule`` "ef21-bc" would
    compress the way back as well.

    Parameters
    ----------
    params, comm, compressor, dense_steps, plan, overlap : as :class:`EF21`'s
    lr : float
        Radius of the ball for a square matrix.
    beta : float
        Weight of the new gradient: 0.05 is a momentum of 0.95.
    weight_decay : float
        Decoupled.
    vector_radius : float
        Step of the entries of vectors (biases, gains), as a multiple of lr.
    """

    def __init__(self, params: Iterable[Any], comm: Comm, compressor: Compressor, *, lr: float = 0.02,
                 beta: float = 0.05, weight_decay: float = 0.0, vector_radius: float = 0.1, dense_steps: int = 1,
                 plan: PlanBuilder = plan_for, overlap: bool = False) -> None:
        descent = LinearMinimization(parameters_of(params), lr=lr, weight_decay=weight_decay, vector_radius=vector_radius)
        super().__init__(descent, comm, compressor, placement="gradient", rule="ef21-sgdm", plan=plan,
                         dense_steps=dense_steps, overlap=overlap, model=params, eta=beta)
