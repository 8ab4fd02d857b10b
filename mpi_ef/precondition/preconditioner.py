"""Gradients of layers multiplied by inverses of small matrices, which all ranks learn together."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mpi_ef.collectives import Plan, plan_for
from mpi_ef.comm.consensus import OnAllRanks, SharedErrors, agree, ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity
from mpi_ef.errors import DtypeError, NonFiniteError, OptionError, briefly
from mpi_ef.kernels.backend import backend, side_of
from mpi_ef.statetree import REPLICATED, Leaf, Stateful, StateTree, attribute

from .factors import Group, groups_of
from .fallback import Fallback
from .forms import FORMS
from .layers import LayerReport, find_layers
from .options import Options, check
from .sums import Sides, Sums, width

__all__ = ["Preconditioner"]


class Preconditioner(OnAllRanks, Stateful, metaclass=SharedErrors):
    """Second order for any optimizer: of a layer's gradient G it makes ``P_g G P_a``. Construction is collective.

    ``P_a`` and ``P_g`` stand for the inverses of the second moments of a layer's inputs and of its outputs' gradients. What
    they are learned from are, but for "kfac", two mean vectors a layer, so that ranks exchange d_in + d_out numbers in
    place of d_in^2 + d_out^2, and that in every tenth step. :meth:`step` goes between the backward pass and the step of any
    optimizer, also with gradients that something else has made the same on all ranks (DistributedDataParallel)::

        preconditioner = Preconditioner(model, comm)
        ...
        loss.backward()
        preconditioner.step()
        optimizer.step()

    :class:`mpi_ef.MKOR` has one inside, and a rule with compressed messages under it.

    Parameters
    ----------
    model : torch.nn.Module
        Its ``Linear``, ``Conv1d``, ``Conv2d`` and ``Conv3d`` layers take part; :attr:`layers` says which, and why others do
        not: grouped convolutions, weights that modules of other kinds share, parametrised or frozen ones. Other parameters
        keep their gradients.
    comm : MPI.Comm
    form : {"window", "exact", "blended", "eva", "kfac"}
        "window", this library's own: P from the last vectors, damped relative to their size. "exact": the inverse that MKOR
        (Mozaffari et al. 2023, arXiv 2306.01685) means, with its stabilizer. "blended": that of its authors' package.
        "eva" (Zhang et al. 2023, arXiv 2308.02123): from the running mean of the vectors alone. "kfac": from second
        moments themselves, which travel as matrices (KAISA, arXiv 2107.01739). Vectors that are too long for float32 are
        shortened ("exact", "blended"). See :mod:`mpi_ef.precondition.forms`.
    sides : {"both", "inputs", "outputs"}
        "inputs" (``D = G P_a``) for raw inputs, with half the bytes.
    every : int
        Steps between two exchanges, the first of which is in the first step. There is one in the second step as well: P from
        a single vector takes one direction away and nothing else, and training remembers that for long.
    gamma : float
        What a vector counts an exchange later, in (0, 1).
    window : int
        m, how many vectors "window" keeps of a side.
    damping : float
        mu, of the sum of the squares of what was seen, 1e-6 at least; of "eva", absolute.
    rescale : bool
        Give D the norm of G, layer by layer, so that learning rates stay valid.
    stabilizer : (float, float)
        (eps, zeta) of "exact".
    exclude : sequence of str or torch.nn.Module
        Layers to leave out: names with wildcards, ``"blocks.*"``, or modules with all that is in them.
    statistics : Compressor, optional
        How vectors travel: ``Quantize("bf16")`` halves their bytes; not changed by default. No other: a TopK of means is
        no mean, and "int8" or "fp16" would lose small layers beside large ones.
    fallback : float, optional
        MKOR-H: go on without from the step in which progress of the loss is less than this share of the largest so far,
        see :mod:`mpi_ef.precondition.fallback`; every rank passes its loss to :meth:`note_loss` then. Memory stays.
    fallback_every : int
        Steps between two looks.
    parameters : iterable of Parameter, optional
        Those that are trained, all of the model by default.

    Attributes
    ----------
    layers : list of LayerReport
        (name, shape, part) of every layer of those kinds.
    steps, updates, restarts, skipped : int
        Steps and exchanges that were completed; layers that began anew as what was kept was not finite ("exact");
        exchanges without effect, as some rank's numbers were not finite.
    fallen_back_at : int or None
        Step of the fallback.

    Raises
    ------
    OptionError, DtypeError
        On all ranks, when an option is out of range or no layer is left.
    DisagreementError
        On all ranks, when layers or options differ between them.

    Notes
    -----
    What a rank sends in an exchange is a_l, g_l and a word for each layer, and its loss: ``sum (q + p + 1) + 1`` numbers,
    through :class:`DenseMean`. Ranks that have not used a layer send zeros, and the mean is over those that have. Hooks sum
    up rows in float32, of float64 layers in float64, in steps that are due alone; what a forward pass saw counts when a
    backward pass makes the gradient of the layer's weight, and no longer when a later one finds ``weight.grad`` None; where
    gradients are thrown away without, call :meth:`forget`. Compiled models are not seen. Memory: "window" m (p + q) numbers
    a layer, "exact" and "blended" p^2 + q^2, "kfac" twice that; and the gradients of layers once more, twice where matrices
    are multiplied. Products are torch's: equal bits on equal machines only.
    """

    built = "the building of a preconditioner"

    def __init__(self, model: object, comm: Comm, *, form: Literal["window", "exact", "blended", "eva", "kfac"] = "window",
                 sides: Sides = "both", every: int = 10, gamma: float = 0.95, window: int = 16, damping: float = 0.03,
                 rescale: bool = True, stabilizer: tuple[float, float] = (2.0, 0.9), exclude: Sequence[Any] = (),
                 statistics: Compressor | None = None, fallback: float | None = None, fallback_every: int = 20,
                 parameters: Iterable[Tensor] | None = None) -> None:
        self.comm, self.form, self.sides, self.every = comm, form, sides, every
        self.steps = self.updates = self.skipped = 0
        self._losses: list[float] = []
        self._warned, self._learns = False, True
        compressor = Identity() if statistics is None else statistics

        def facts() -> dict[str, object]:
            options = Options(gamma, window, damping, stabilizer)
            check(type(self).__name__, options, form, sides, every, rescale, compressor, fallback, fallback_every)
            self._fallback = None if fallback is None else Fallback(
                fallback, fallback_every, rounded=not isinstance(compressor, Identity))
            trained = None if parameters is None else {id(p) for p in parameters if p.requires_grad}
            self._layers, self._rows = find_layers(model, lambda p: _untrained(p, trained), exclude)
            self._lay_out(options, rescale=rescale)
            return {"the layers": self._described(), "form": form, "sides": sides, "every": every, "gamma": gamma,
                    "window": window, "damping": damping, "rescale": rescale, "stabilizer": stabilizer,
                    "statistics": statistics, "fallback": fallback, "fallback_every": fallback_every}

        agree(comm, type(self).__name__, facts, "build the same model and options on every rank", call=self.built)
        self.plan: Plan = plan_for(comm, compressor, self._sent.size, self._dtype, residual=False, device=self._device)
        self._sums = Sums(self._layers, sides, self._tensor(self._sent), lambda: self.due, squared=form == "kfac")

    def _lay_out(self, options: Options, *, rescale: bool) -> None:
        weights = [layer.weight for layer in self._layers]
        homes = {(w.device, torch.float64 if w.dtype == torch.float64 else torch.float32) for w in weights}
        if len(homes) > 1 or not all(w.dtype.is_floating_point for w in weights):
            listed = ", ".join(sorted({f"{w.dtype} on {w.device}" for w in weights}))
            raise DtypeError(f"{type(self).__name__}: layers are {listed}; have all on one device, none or all in float64")
        ((where, dtype),) = homes
        self._dtype, self._device = np.dtype(str(dtype).removeprefix("torch.")), side_of(where.type, where.index)
        kernels = self._kernels = backend(self._dtype, self._device)
        kind, groups = FORMS[self.form], groups_of(self._layers)
        wanted = [name == "inputs" for name in ("inputs", "outputs") if self.sides in ("both", name)]
        sizes = [(numbers, inputs, self._layers[numbers[0]].q if inputs else self._layers[numbers[0]].p)
                 for numbers in groups for inputs in wanted]
        self._factors = kernels.zeros(sum(len(numbers) * kind.floats(d, options.window) for numbers, _, d in sizes))
        self._norms = np.zeros(sum(len(numbers) for numbers, *_ in sizes) * kind.scalars(options.window))
        memory, start, first = self._tensor(self._factors), 0, 0
        built: dict[tuple[int, bool], Any] = {}
        for numbers, inputs, d in sizes:
            stop = start + len(numbers) * kind.floats(d, options.window)
            last = first + len(numbers) * kind.scalars(options.window)
            built[numbers[0], inputs] = kind(len(numbers), d, options, memory[start:stop], self._norms[first:last])
            start, first = stop, last
        self.groups = [Group(numbers, self._layers, built.get((numbers[0], True)), built.get((numbers[0], False)), memory,
                             rescale=rescale) for numbers in groups]
        size = width(self._layers, self.sides, squared=self.form == "kfac")
        self._sent, self._mean = kernels.zeros(size), kernels.zeros(size)

    @staticmethod
    def _tensor(vector: Any) -> Tensor:
        return torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector.tensor

    def _described(self) -> str:
        return ", ".join(f"{layer.name} ({layer.p}, {layer.q})" for layer in self._layers)

    @property
    def layers(self) -> list[LayerReport]:
        """What is done with every linear and convolutional layer of the model. Local."""
        fallen = f"fallen back in step {self.fallen_back_at}" if self.fallen_back_at is not None else self.sides
        never = {self._layers[number].name for group in self.groups for number in group.never_seen()}
        rows = []
        for row in self._rows:
            part = row.part or ("never seen" if self.updates and row.name in never else fallen)
            rows.append(row._replace(part=part))
        return rows

    @property
    def fallen_back_at(self) -> int | None:
        """Step in which MKOR-H has gone on without. Local."""
        return None if self._fallback is None else self._fallback.at

    @property
    def restarts(self) -> int:
        """How many layers began anew. Local."""
        return sum(group.restarts for group in self.groups)

    @property
    def due(self) -> bool:
        """Whether the next step exchanges. Local, alike on all ranks."""
        return (self.steps % self.every == 0 or self.steps == 1) and self.fallen_back_at is None

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank in all exchanges so far."""
        return self.plan.sent_nbytes

    def note_loss(self, loss: Any) -> None:
        """Take note of this rank's loss in this step, for MKOR-H. Local, after :meth:`forget` and zero_grad.

        Raises
        ------
        OptionError
            With `fallback`: it is no number.
        """
        if self._fallback is None:
            return
        try:
            self._losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))
        except (TypeError, ValueError, RuntimeError):
            raise OptionError(f"{type(self).__name__}: loss={briefly(loss)} is no number, which fallback goes by; pass the "
                              "mean loss of this rank, or let the closure return it") from None

    def step(self, *, scale: float = 1.0) -> None:
        """Learn, where this step is due, and precondition the gradients of the layers. Collective in steps that are due.

        Parameters
        ----------
        scale : float
            What gradients have been multiplied by since the backward pass: ``1 / scaler.get_scale()`` after
            ``scaler.unscale_(optimizer)``.

        Raises
        ------
        OptionError
            With `fallback`: this rank has not noted its loss; the others raise `PeerError`. The step can be repeated.

        Notes
        -----
        When any rank's numbers are not finite, all learn nothing in this step, with a warning on rank 0.
        """
        if self.due:
            problem = None
            try:
                self.close(scale)
            except OptionError as error:
                problem = error
                self._sums.vector[-1] = float("nan")  # the others are on their way into the exchange
            try:
                self.exchange()
            except NonFiniteError as error:
                self._complain(problem)
                self.skip(error.ranks)
        self.precondition()
        self.advance()

    def _complain(self, problem: Exception | None) -> None:
        """Raise on all ranks the problem that one of them has. Collective."""

        def facts() -> dict[str, object]:
            if problem is not None:
                raise problem
            return {}

        try:
            agree(self.comm, f"{type(self).__name__}.step", facts, "")
        except BaseException:
            self._sums.forget()
            raise

    def close(self, scale: float = 1.0) -> bool:
        """Make ready what is sent of this step; tell whether it is finite. Local.

        Raises
        ------
        OptionError
            With `fallback`: this rank has not noted its loss.
        """
        if self._fallback is not None:
            if not self._losses:
                raise OptionError(f"{type(self).__name__}: fallback wants the loss of every rank; call note_loss(loss) "
                                  "between zero_grad() and step(), or pass step a closure that returns it")
            self._sums.vector[-1] = sum(self._losses) / len(self._losses) - self._fallback.reference
        self._sums.close(scale)
        return bool(self._kernels.finite([self._sent]))

    def exchange(self, present: float = 1.0) -> None:
        """Let all ranks learn from the mean of what :meth:`close` has made, on a share `present` of them. Collective.

        Raises
        ------
        NonFiniteError
            On all ranks, with everything as it was.
        """
        self.plan.exchange(self._sent)
        self.plan.set_mean(self._mean)
        mean = self._tensor(self._mean)
        told = self._sums.told(mean)
        for group in self.groups:
            group.update(told)
        self.updates += 1
        if self._fallback is not None:
            self._fallback.hear(self.steps, self._fallback.reference + float(mean[-1]) / present)
            if self.fallen_back_at is not None:
                self._sums.remove_hooks()
        if not self._warned:
            self._warn_of_unseen(told)

    def _warn_of_unseen(self, told: Sequence[tuple[Tensor | None, Tensor | None, float]]) -> None:
        self._warned = True
        never = [layer.name for layer, (*_, share) in zip(self._layers, told, strict=True) if not share]
        if never and self.comm.Get_rank() == 0:
            listed = ", ".join(never[:4]) + (f" and {len(never) - 4} more" if len(never) > 4 else "")
            warnings.warn(f"{type(self).__name__}: {listed}: not called as a module in this step on any rank, so their "
                          "gradients stay as they are; what reads the weight of a module by itself, such as "
                          "MultiheadAttention, or a compiled model, cannot be seen", RuntimeWarning, stacklevel=4)

    def parameters(self) -> list[Tensor]:
        """Return the parameters whose gradients are preconditioned. Local."""
        return [p for layer in self._layers for p in (layer.weight, layer.bias) if p is not None]

    def skip(self, ranks: tuple[int, ...]) -> None:
        """Forget this step, as the numbers of some ranks were not finite. Local."""
        self.skipped += 1
        if self.comm.Get_rank() == 0:
            warnings.warn(f"{type(self).__name__}: nothing learned in step {self.steps}: NaN or Inf in what layers saw on "
                          f"{ranks_text(ranks)}", RuntimeWarning, stacklevel=3)

    @torch.no_grad()
    def precondition(self) -> None:
        """Multiply the gradients of the layers, in the parameters' ``grad``. Local."""
        if self.fallen_back_at is None:
            for group in self.groups:
                group.precondition()

    def advance(self) -> None:
        """End a step. Local."""
        self.steps += 1
        self.forget()

    def forget(self) -> None:
        """Forget what layers have seen since the last step, as where a loss was thrown away. Local."""
        self._sums.forget()
        self._losses.clear()

    def remove_hooks(self) -> None:
        """Take the hooks off the model: nothing is learned from then on. Local, on all ranks."""
        self._learns = False
        self._sums.remove_hooks()

    def state_tree(self) -> StateTree:
        """Describe the state: what was learned, the same on all ranks. Local."""
        leaves = {
            "steps": attribute(self, "steps"), "updates": attribute(self, "updates"),
            "skipped": attribute(self, "skipped"),
            "by layer": Leaf(REPLICATED, read=lambda: [side.updates for side in self._sides()], write=self._write_updates),
            "restarts": Leaf(REPLICATED, read=lambda: [group.restarts for group in self.groups], write=self._write_restarts),
            "factors": Leaf(REPLICATED, self._factors),
        }
        if self._norms.size:
            leaves["norms"] = Leaf(REPLICATED, self._norms)
        if self._fallback is not None:
            leaves["fallback"] = self._fallback.leaf()
        falls = "" if self._fallback is None else ", with fallback"
        identity = {"preconditioner": f"{self.form}, sides={self.sides}{falls}", "layers": self._described()}
        return StateTree(leaves, identity=identity, prefix="preconditioner.")

    def _sides(self) -> list[Any]:
        return [side for group in self.groups for side in group.sides]

    def _write_updates(self, saved: list[list[int]]) -> None:
        for side, updates in zip(self._sides(), saved, strict=True):
            side.updates[:] = updates

    def _write_restarts(self, saved: list[int]) -> None:
        for group, restarts in zip(self.groups, saved, strict=True):
            group.restarts = restarts

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, the same on all ranks. Local."""
        return self.state_tree().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, on any number of ranks. Local; call on all ranks.

        Raises
        ------
        OptionError, ShapeError
            It is of another form, other sides or other layers; nothing is changed then.
        """
        tree = self.state_tree()
        tree.check(state_dict)
        tree.load_values(state_dict)
        tree.load_arrays(state_dict)
        self.loaded()

    def loaded(self) -> None:
        """Derive again what follows from what was written. Local."""
        for side in self._sides():
            side.loaded()
        self.forget()
        if self.fallen_back_at is not None:
            self._sums.remove_hooks()
        elif self._learns:  # also where what was loaded is of before the fallback
            self._sums.watch()


def _untrained(p: Tensor, trained: "set[int] | None") -> str:
    """Return why a parameter keeps its gradient, "" where it does not."""
    if not p.requires_grad:
        return "not trained"
    return "" if trained is None or id(p) in trained else "not trained by this optimizer"
