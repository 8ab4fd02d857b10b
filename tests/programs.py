"""Programs for a communicator, run on virtual ranks and on real ones. Data differ from rank to rank."""

import threading
from typing import Any
from unittest import mock

import numpy as np
import torch
import virtual
from vectors_for_tests import gaussian

from mpi_ef.collectives import ClientsMean, DenseMean, GatherMean, LowRankMean, RobustMean, TwoPhaseMean
from mpi_ef.compress import Identity, LowRank, Quantize, RandK, Sign, TopK
from mpi_ef.feedback import RULES as ALL_RULES
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.train import loop as trainer
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.program import train
from mpi_ef.optim import EF21, DistributedOptimizer, EControl
from mpi_ef.testing.law import same_bits
from mpi_ef.testing.regression import Net as model
from mpi_ef.testing.regression import loss_of

__all__ = ["loss_of", "model", "same_bits"]  # and what follows

PLANS = {
    "dense": lambda comm, d, dtype: DenseMean(comm, d, dtype),
    "gather identity": lambda comm, d, dtype: GatherMean(comm, Identity(), d, dtype),
    "gather topk": lambda comm, d, dtype: GatherMean(comm, TopK(0.1, values=Quantize("bf16")), d, dtype),
    "gather topk of segments": lambda comm, d, dtype: GatherMean(
        comm, TopK(0.1, segments=(d // 3, 0, d // 2, d - d // 3 - d // 2)), d, dtype
    ),
    "gather randk": lambda comm, d, dtype: GatherMean(comm, RandK(0.2, seed=3), d, dtype),
    "gather sign": lambda comm, d, dtype: GatherMean(comm, Sign(block=64), d, dtype),
    "two-phase sign": lambda comm, d, dtype: TwoPhaseMean(comm, Sign(), d, dtype),
    "two-phase topk": lambda comm, d, dtype: TwoPhaseMean(comm, TopK(0.1), d, dtype, reply=TopK(0.5)),
    "two-phase randk": lambda comm, d, dtype: TwoPhaseMean(comm, RandK(0.3), d, dtype),
    "two-phase int8": lambda comm, d, dtype: TwoPhaseMean(comm, Quantize("int8", block=64), d, dtype),
    "two-phase without residual": lambda comm, d, dtype: TwoPhaseMean(comm, Sign(), d, dtype, residual=False),
    "gather low rank": lambda comm, d, dtype: GatherMean(comm, LowRank(1), d, dtype),
    "low rank": lambda comm, d, dtype: LowRankMean(
        comm, LowRank(2, shapes=((d // 12, 2, 3), (d % 12,), (3, 2 * (d // 12)))), d, dtype
    ),
}
SIZES = (0, 1, 3, 8, 65, 1001)
RULES = ("ef14", "ef21", "econtrol")
OPTIMIZERS = ("ef21", "econtrol", "adamw update", "sgd gradient", "sign update")


def laws_in(laws):
    """Return the names of the laws that a suite of mpi_ef.testing has."""
    return [name for name in dir(laws) if name.startswith("test_")]


def exchanges(plan, d, dtype, steps=3):
    """Return a program that gives, for each exchange, this rank's vector, its decoded message and the mean."""

    def program(comm):
        p = PLANS[plan](comm, d, dtype)
        rows = []
        for step in range(steps):
            x = gaussian(p.rank, d, dtype, step=step)
            own, mean = np.zeros(d, dtype), np.zeros(d, dtype)
            if step % 2:
                messages = p.exchange(x)
            else:
                p.start(x)
                messages = p.wait()
            messages.add_own(own)
            messages.add_mean(mean)
            rows += [x, own, mean]
        return [*rows, *p.state().values()]

    return program


def feedback_through(plan, rule, comm, d, dtype, dense_steps=0):
    """Return a rule at work. EControl is told its eta where the plan's worst case says nothing about a good one."""
    options = {"eta": 0.1} if (plan, rule) == ("low rank", "econtrol") else {}
    return ErrorFeedback(rule, PLANS[plan](comm, d, dtype), dense_steps=dense_steps, **options)


def rule_steps(rule, plan, d, dtype, steps=5, dense_steps=0):
    """Return a program that gives the results of all steps and the state at the end."""

    def program(comm):
        feedback = feedback_through(plan, rule, comm, d, dtype, dense_steps)
        rank = comm.Get_rank()
        out = [feedback.step(gaussian(rank, d, dtype, step=step)).copy() for step in range(steps)]
        return {"results": out, "per rank": feedback.per_rank(), "replicated": feedback.replicated()}

    return program


CLIENT_D, CLIENTS_IN_ALL = 37, 7
CLIENT_RULES = [rule for rule in ALL_RULES if rule != "ef14-momentum"]  # which is for one vector a rank
CLIENT_OPTIONS = {
    "econtrol": {"eta": 0.1},
    "d-ec-sgd": {"correction": RandK(0.3, seed=5)},
    "ef21-bc": {"reply": TopK(0.3)},
    "ef21-pp": {"participation": 0.4},
    "byz-ef21-bc": {"reply": TopK(0.3)},
}
CLIENT_WEIGHTS = np.arange(1.0, CLIENTS_IN_ALL + 1) / (CLIENTS_IN_ALL * (CLIENTS_IN_ALL + 1) / 2)


def own_vectors(plan, step, dtype=np.float64):
    """Return a vector for each client of this rank, a function of the number of the client alone."""
    return np.array([gaussian(client, plan.d, dtype, step=step) for client in range(plan.first, plan.first + plan.own)])


def clients_feedback(comm, rule, dtype=np.float64, dense_steps=1):
    """Return a rule at work for seven clients, with options that are not its defaults."""
    weights = CLIENT_WEIGHTS if rule == "ef21-w" else None
    compressor = RandK(0.2, seed=3) if rule == "marina" else TopK(0.1)
    if rule.startswith("byz-"):
        plan = RobustMean(comm, compressor, CLIENT_D, dtype, f=2, clients=CLIENTS_IN_ALL)
    else:
        plan = ClientsMean(comm, compressor, CLIENT_D, dtype, clients=CLIENTS_IN_ALL, weights=weights)
    return ErrorFeedback(rule, plan, dense_steps=dense_steps, **CLIENT_OPTIONS.get(rule, {}))


def client_steps(rule, *, count=6, dense_steps=1, dtype=np.float64):
    """Return a program that gives the results and, by client, the state of some steps."""

    def program(comm):
        feedback = clients_feedback(comm, rule, dtype, dense_steps)
        plan = feedback.plan
        out = [feedback.step(own_vectors(plan, step, dtype)).copy() for step in range(count)]
        local = {name: a.reshape(plan.own, CLIENT_D).copy() for name, a in feedback.per_rank().items()}
        return {"results": out, "local": local, "replicated": feedback.replicated(), "bytes": plan.message_nbytes}

    return program


def trained(ranks: int, config: TrainConfig) -> list[dict[str, Any]]:
    """Train on virtual ranks and return their summaries.

    They build their models one after the other: torch has one generator a process, so that threads which seed it and
    draw from it at the same time begin with other parameters every time.
    """
    build, one_at_a_time = trainer._build, threading.Lock()

    def alone(config: TrainConfig) -> Any:
        with one_at_a_time:
            return build(config)

    with mock.patch.object(trainer, "_build", alone):
        return virtual.results(ranks, lambda comm: train(comm, config))


def build_optimizer(name, net, comm):
    if name == "ef21":
        return EF21(net.parameters(), comm, TopK(0.2), lr=0.05)
    if name == "econtrol":
        return EControl(net.parameters(), comm, TopK(0.2), lr=0.05, momentum=0.5)
    if name == "adamw update":
        named = list(net.parameters())
        groups = [{"params": named[:2], "lr": 1e-2}, {"params": named[2:], "weight_decay": 0.0}]
        return DistributedOptimizer(torch.optim.AdamW(groups, lr=2e-2), comm, TopK(0.1), dense_steps=2)
    if name == "sgd gradient":
        sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        return DistributedOptimizer(sgd, comm, Identity(), placement="gradient")
    return DistributedOptimizer(torch.optim.Adam(net.parameters(), lr=1e-2), comm, Sign())


def training(name, steps):
    """Return a program that trains and gives the parameters, then the losses."""

    def program(comm):
        rank = comm.Get_rank()
        net = model()
        if rank:  # replicas start different: rank 0's parameters must win
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(rank)
        optimizer = build_optimizer(name, net, comm)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(net, rank, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return [p.detach().numpy().copy() for p in net.parameters()], losses

    return program
