"""What every optimizer keeps to, one law a test, on virtual ranks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from mpi_ef import registry
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DisagreementError, MpiEfError, OptionError, briefly
from mpi_ef.optim.flat import FlatOptimizer

from .faults import CommunicationError, FaultyComm
from .law import Laws, law, must, same_bits
from .regression import (
    Run,
    everything,
    groups_of,
    loss_of,
    net_of,
    parameters_of,
    resumes,
    skips_broken_gradients,
    steps_of,
    trained,
)
from .virtual import VirtualComm, results, run

__all__ = ["OptimizerLaws"]


@contextmanager
def _raises(kind: type[MpiEfError], otherwise: str, *words: str) -> Iterator[None]:
    """Raise `AssertionError` unless an error of a kind, with some words, is raised inside."""
    try:
        yield
    except kind as error:
        must(all(word in str(error) for word in words), f"the message is {error}")
    else:
        raise AssertionError(otherwise)


class OptimizerLaws(Laws):
    """Tests for an optimizer: a subclass, named ``Test...`` for pytest, says which.

    Attributes
    ----------
    optimizer : callable or str
        ``optimizer(params, comm, **options)`` builds it, for example the class; or a specification.
    options : dict
        Of runs of a few steps.
    ranks : tuple of int
        On which it learns.
    saved_after : tuple of int
        States are saved, and gradients break, after so many steps: in every phase, where it has phases.
    learns : (int, slice, float)
        Steps; the first losses, of which the last ten are to be less than this share in the mean.
    learning : dict
        Options of these runs, besides `options`.
    clips : bool
        Whether it takes ``clip``, the largest root of the ranks' mean squared norm of a gradient.
    decays : bool
        Whether groups have a ``weight_decay`` that counts.
    bad : tuple of (dict, str)
        Options that are refused, and words of the message.
    differing : (str, object, object) or None
        An option, and values of it on which ranks disagree.
    """

    tested = "optimizer"
    optimizer: ClassVar[str | Callable[..., FlatOptimizer]]
    options: ClassVar[dict[str, Any]] = {}
    ranks: ClassVar[tuple[int, ...]] = (1, 2)
    saved_after: ClassVar[tuple[int, ...]] = (1, 3, 5)
    learns: ClassVar[tuple[int, slice, float]] = (60, slice(3), 0.8)
    learning: ClassVar[dict[str, Any]] = {}
    clips: ClassVar[bool] = True
    decays: ClassVar[bool] = True
    bad: ClassVar[tuple[tuple[dict[str, Any], str], ...]] = ()
    differing: ClassVar[tuple[str, Any, Any] | None] = None

    def finished(self, optimizer: FlatOptimizer) -> None:
        """Check what else holds after training; nothing here."""

    def _built(self, params: nn.Module | Iterable[Any], comm: Comm, **options: Any) -> FlatOptimizer:
        """Return it on parameters or groups, or on the parameters of a model. Collective."""
        how, options = type(self).optimizer, self.options | options
        params = params.parameters() if isinstance(params, nn.Module) else params
        built: Any = how(params, comm, **options) if callable(how) else \
            registry.built("optimizer", how, params, comm, **options)
        return built  # type: ignore[no-any-return]

    def _learned(self, runs: list[Run], first: slice, last: int, share: float) -> None:
        for rank, seen in enumerate(runs):
            now, then = float(np.mean(seen.losses[-last:])), float(np.mean(seen.losses[first]))
            must(now < share * then, f"the loss on rank {rank} of {len(runs)} was {then:.4g} and is {now:.4g}")

    @law("equal replicas")
    def test_replicas_are_equal(self) -> None:
        """Parameters and what is marked replicated are the same bits everywhere after every step that is to end so."""
        for n in self.ranks:
            runs = trained(n, self.learns[0], lambda net, comm: self._built(net, comm, **self.learning), compare_every=0)
            for seen in runs:
                must(seen.met == runs[0].met, "ranks synchronise in different steps")
                must(same_bits(seen.shared, runs[0].shared), f"what is marked replicated differs between {n} ranks")
                for step, met in enumerate(seen.met):
                    same = same_bits(seen.path[step], runs[0].path[step])
                    must(same == met or seen is runs[0], f"parameters on {n} ranks {'differ' if met else 'are the same'} "
                                                         f"after step {step + 1}")
                if seen.optimizer is not None:  # it is one of this process
                    self.finished(seen.optimizer)

    @law("learning")
    def test_it_learns(self) -> None:
        """The loss falls on every rank, and parameters without a gradient stay where they are."""
        steps, first, share = self.learns
        runs = trained(max(self.ranks), steps, lambda net, comm: self._built(net, comm, **self.learning))
        self._learned(runs, first, 10, share)
        names = [name for name, _ in net_of().named_parameters()]
        for name, before, after in zip(names, parameters_of(net_of()), runs[0].path[-1], strict=True):
            if name in ("unused", "frozen"):
                must(same_bits(before, after), f"{name}, of which there is no gradient on any rank, has moved")

    @law("16-bit parameters")
    def test_16_bit_parameters(self) -> None:
        """Masters in float32 are kept: what is too small for 16 bits is not lost."""
        runs = trained(2, 60, lambda net, comm: self._built(net, comm, **self.learning), dtype=torch.bfloat16)
        self._learned(runs, slice(5), 5, 0.8)
        must(same_bits(runs[0].path[-1], runs[1].path[-1]) == runs[0].met[-1], "replicas differ")

    @law("going on from a state")
    def test_a_state_that_was_loaded_goes_on(self) -> None:
        """To the last bit, from every phase, with groups, and through torch.save and torch.load with their defaults."""
        for before in self.saved_after:
            resumes(2, lambda net, comm: self._built(groups_of(net), comm), before=before, after=6)

    @law("going back to a state")
    def test_an_early_state_is_loaded_into_an_optimizer_that_was_further(self) -> None:
        """The steps that follow are those that followed it, however far the optimizer had come."""

        def program(comm: VirtualComm) -> None:
            rank, net = comm.Get_rank(), net_of()
            optimizer = self._built(net, comm)
            steps_of(net, optimizer, rank, range(2))
            early = parameters_of(net), optimizer.state_dict()
            path = steps_of(net, optimizer, rank, range(2, 18))
            late = everything(net, optimizer, "sent_nbytes")
            for p, value in zip(net.parameters(), early[0], strict=True):
                p.data.copy_(torch.from_numpy(value))
            optimizer.load_state_dict(early[1])
            must(same_bits(steps_of(net, optimizer, rank, range(2, 18)), path), "the steps are others")
            must(same_bits(everything(net, optimizer, "sent_nbytes"), late), "the state after them is another one")

        results(2, program)

    @law("steps that are skipped")
    def test_broken_gradients_are_skipped(self) -> None:
        """A NaN or Inf in the gradient of one rank, in every phase: all ranks skip the step, and nothing changes."""
        for warm in self.saved_after:
            skips_broken_gradients(3, self._built, warm=warm)

    @law("global clipping")
    def test_clipping_is_global(self) -> None:
        """All ranks scale by the same factor, so that the mean of their squared norms is clip^2; in every phase."""

        def program(comm: VirtualComm) -> list[tuple[Any, Any]]:
            rank, net, seen = comm.Get_rank(), net_of(), []
            optimizer = self._built(net, comm, clip=0.5)
            for step in range(max(self.saved_after)):
                optimizer.zero_grad()
                (100 * (rank + 1) * loss_of(net, rank, step)).backward()  # type: ignore[no-untyped-call]
                optimizer.flat.collect_gradients()
                before = optimizer.flat.gradients.copy()
                optimizer.step()
                seen.append((before, optimizer.flat.gradients.copy()))
            return seen

        for step, of_ranks in enumerate(zip(*results(2, program), strict=True) if self.clips else ()):
            factor = 0.5 / np.sqrt(np.mean([float(np.linalg.norm(whole)) ** 2 for whole, _ in of_ranks]))
            must(factor < 0.1, "the gradients of this law are too small")
            for rank, (whole, clipped) in enumerate(of_ranks):
                close = np.allclose(clipped, whole * factor, rtol=1e-5, atol=0)
                must(close, f"in step {step + 1} rank {rank} has not scaled its gradient by {factor:.4g}, as all are to")

    @law("options out of range")
    def test_bad_options(self) -> None:
        """All ranks raise `OptionError`, with one line."""
        for options, words in self.bad:
            for outcome in run(2, lambda comm, options=options: self._built(net_of(), comm, **options)):  # type: ignore[misc]
                must(isinstance(outcome, OptionError), f"{options} give {briefly(outcome, 200)}")
                must(words in str(outcome) and "\n" not in str(outcome), f"{options} say {outcome} and not {words}")

    @law("options that differ")
    def test_ranks_with_other_options_all_learn_about_it(self) -> None:
        """Where the optimizer is built; hyper-parameters of groups too."""

        def disagree(build: Callable[[VirtualComm], object], words: str) -> None:
            for outcome in run(2, build):
                raised = isinstance(outcome, DisagreementError) and words in str(outcome)
                must(raised, f"ranks that disagree on {words.partition(':')[0]} give {briefly(outcome, 200)}")

        if self.differing is not None:
            name, *values = self.differing
            disagree(lambda comm: self._built(net_of(), comm, **{name: values[comm.Get_rank()]}),
                     f"{name}: {values[0]} on rank 0; {values[1]} on rank 1")
        disagree(lambda comm: self._built([{"params": net_of().parameters(), "lr": 0.1 + comm.Get_rank()}], comm),
                 "hyper-parameters")

    @law("learning rates")
    def test_groups_have_learning_rates_of_their_own(self) -> None:
        """What a scheduler writes into a group counts from the next step on, for its parameters; at 0 nothing moves."""

        def moved(comm: VirtualComm, *factors: float, decay: float = 0.3) -> tuple[list[Any], list[Any]]:
            net = net_of()
            optimizer = self._built(groups_of(net), comm)
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] *= factor
            optimizer.param_groups[1]["weight_decay"] = decay
            path = steps_of(net, optimizer, comm.Get_rank(), range(max(self.saved_after)))
            return path[-1][:3], path[-1][3:]

        def program(comm: VirtualComm) -> None:
            begun, usual = parameters_of(net_of()), moved(comm, 1, 1)
            for which, (factors, others) in enumerate({(0.5, 1): "first", (1, 0.5): "second"}.items()):
                same = same_bits(moved(comm, *factors)[which], usual[which])
                must(not same, f"half of the learning rate of the {others} group gives the same parameters")
            for decay in (0.0, 0.9) if self.decays else ():
                other = moved(comm, 1, 1, decay=decay)[1]
                must(not same_bits(other, usual[1]), f"weight_decay={decay} of a group gives the same parameters as 0.3")
            first, second = moved(comm, 0, 0)
            must(same_bits([*first, *second], begun), "parameters have moved with learning rates of 0")

        results(2, program)

    @law("learning rates that drift apart")
    def test_learning_rates_that_drift_apart_stop_all_ranks(self) -> None:
        """For example ReduceLROnPlateau on each rank's own loss: the next step raises on all ranks and changes nothing."""

        def program(comm: VirtualComm) -> None:
            net = net_of()
            optimizer = self._built([{"params": net.parameters(), "lr": 0.1}], comm)
            optimizer.param_groups[0]["lr"] /= 1 + comm.Get_rank()
            before = everything(net, optimizer)
            words = f"{type(optimizer).__name__}.step: ranks disagree on hyper-parameters", "0.05"
            with _raises(DisagreementError, "a step with different learning rates raises nothing", *words):
                steps_of(net, optimizer, comm.Get_rank(), range(1))
            must(same_bits(everything(net, optimizer), before), "something has changed")

        results(2, program)

    @law("loading everywhere")
    def test_loading_on_one_rank_only_stops_all_ranks(self) -> None:
        """The next step raises on all ranks."""

        def program(comm: VirtualComm) -> None:
            rank, net = comm.Get_rank(), net_of()
            optimizer = self._built(net, comm)
            saved = optimizer.state_dict()
            steps_of(net, optimizer, rank, range(3))
            if rank == 0:
                optimizer.load_state_dict(saved)
            with _raises(DisagreementError, "a step after loading on rank 0 alone raises nothing",
                         "disagree on completed steps: 0 on rank 0; 3 on rank 1"):
                optimizer.step()

        results(2, program)

    @law("ranks that come late")
    def test_what_comes_late_changes_nothing(self) -> None:
        """A rank that is slow at every call in turn: the parameters are the same bits."""

        def program(comm: VirtualComm) -> None:
            rank, (net, twin), slow = comm.Get_rank(), (net_of(), net_of()), FaultyComm(comm)
            optimizers = self._built(net, slow), self._built(twin, comm)
            for step in range(4):
                if rank == step % 2:
                    slow.arm("delay", step // 2)
                paths = [steps_of(*pair, rank, [step]) for pair in zip((net, twin), optimizers, strict=True)]
                must(same_bits(*paths), f"other parameters after step {step + 1}, in which rank {step % 2} is late")

        results(2, program)

    @law("communication that fails")
    def test_errors_of_communication_are_passed_on(self) -> None:
        """Whichever call of a step raises on a rank, the step raises there."""

        def program(comm: VirtualComm, call: int) -> None:
            net, faulty = net_of(), FaultyComm(comm)
            optimizer = self._built(net, faulty)
            steps_of(net, optimizer, comm.Get_rank(), range(2))
            calls = len(faulty.calls)
            if comm.Get_rank() == 0:
                faulty.arm("raise", call)
            steps_of(net, optimizer, comm.Get_rank(), [2])
            must(len(faulty.calls) <= calls + call, f"call {call} of a step raises on rank 0, and the step does not")

        for call in range(3):
            outcome = run(2, partial(program, call=call), virtual=True)[0]
            must(outcome is None or isinstance(outcome, CommunicationError), str(outcome))

    @law("groups that are known at first")
    def test_groups_cannot_be_added_later(self) -> None:
        """The vector of all parameters is laid out already."""

        def program(comm: VirtualComm) -> None:
            optimizer = self._built(net_of(), comm)
            with _raises(OptionError, "a group was added", "a group cannot be added later"):
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})

        results(1, program)
