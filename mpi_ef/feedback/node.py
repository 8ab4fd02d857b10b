"""A rule at work on two levels: ranks of a node add up their vectors, the rule does its part on slices, between nodes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpi_ef.collectives import NodeMean, Plan
from mpi_ef.collectives.inside import same_memory
from mpi_ef.comm.consensus import agree
from mpi_ef.compress.combination import Combination, Vector
from mpi_ef.errors import MpiEfError, OptionError, counted
from mpi_ef.statetree import NODES, PER_RANK, REPLICATED, Leaf, Reshard, StateTree

from .error_feedback import ErrorFeedback
from .table import Rule

__all__ = ["NodeFeedback"]


class NodeFeedback(ErrorFeedback, through=NodeMean):
    """A rule at work through a :class:`NodeMean`: ``ErrorFeedback(rule, node_mean)`` builds one.

    Its :attr:`plan` is the inner one, for this rank's slice, between nodes: the rule and its arrays are those of a node, of
    which a rank keeps a slice. With one node every step is a dense one. Parameters, attributes and errors: see
    :class:`ErrorFeedback`.

    Attributes
    ----------
    node : NodeMean
    """

    def __init__(self, rule: str | Rule, plan: Plan, *, dense_steps: int = 0, **options: Any) -> None:
        assert isinstance(plan, NodeMean)  # noqa: S101
        self.node, self.first, self._inside_nbytes = plan, plan.part.start, 0
        self.of_node = plan.placement.node.Get_size() > 1
        self._refusal: MpiEfError | None = None
        self._posted = False  # whether a step has begun that was not waited for
        self._settled = False  # whether the result is where the node reads it
        problem: Exception | None = None
        try:
            super().__init__(rule, plan.inner, dense_steps=dense_steps, **options)
        except Exception as error:
            problem = error

        def facts() -> dict[str, object]:
            if problem is not None:
                raise problem
            size = self.plan.d
            for name, leaf in self.state.leaves().items():
                if leaf.array.size != size:
                    raise OptionError(f"NodeMean: rule {self.rule.name} keeps {name}, {leaf.array.size} entries for {size}; "
                                      "take a rule that keeps vectors of a rank or of all")
            return {"rule": self.rule.name, "dense_steps": dense_steps, "options": self.options}

        agree(plan.comm, "ErrorFeedback", facts, "build it from the same arguments everywhere")

    def _alpha(self, plan: Plan) -> float:  # noqa: ARG002
        return self.node.alpha

    def __repr__(self) -> str:
        """Return the rule with its options, the compressor and the plans. Local."""
        places = f"{counted(self.node.placement.nodes, 'node')} of {counted(self.node.size, 'rank')}"
        return f"{super().__repr__().rpartition(' on ')[0]} in a NodeMean on {places}"

    @property
    def resting(self) -> Sequence[slice]:
        """Entries of the vector that rest, see :class:`ErrorFeedback`; of those, what is in this rank's slice."""
        return self._resting

    @resting.setter
    def resting(self, entries: Iterable[slice]) -> None:
        low, size = self.first, self.node.part.stop - self.first
        cut = (slice(max(part.start - low, 0), min(part.stop - low, size)) for part in entries)
        self._resting = [part for part in cut if part.start < part.stop]

    @property
    def row(self) -> Any:
        """Memory for this rank's vector, see :class:`NodeMean`."""
        return self.node.row

    def step(self, vector: Vector | Combination, *, whole: bool = False, **inputs: Any) -> Vector:
        """Exchange, see :meth:`ErrorFeedback.step`. Collective."""
        self._check_idle()
        v, refusal = self.node.inside.gather(*self._given(vector), self._place)
        if refusal is not None:
            super().refuse(refusal)
        steps, offer = self._begun(v, whole, inputs)
        problem: MpiEfError | None = None
        try:
            plan: Plan = offer.exchange()
        except MpiEfError as error:
            problem = error
        try:
            self.node.inside.settle(problem)
        except MpiEfError:
            if problem is None:
                plan.undo()
            raise
        return self._spread(self._commit(steps, plan))

    @property
    def under_way(self) -> bool:
        """Whether a step was started, see :attr:`ErrorFeedback.under_way`; also where the node has not added up yet."""
        return self._posted or super().under_way

    def start(self, vector: Vector | Combination) -> None:
        """Begin a step, see :meth:`ErrorFeedback.start`. Collective."""
        self._check_idle()
        self._posted = True
        self.node.inside.post(*self._given(vector), self._place, self._go_on)

    def _go_on(self, v: Vector, refusal: MpiEfError | None) -> None:
        """Let the rule begin, once the node has added up."""
        if refusal is not None:
            super().refuse(refusal)
        super().start(v)

    def progress(self) -> None:
        """Let MPI work on the step under way. Local."""
        self.node.inside.advance(wait=False)
        super().progress()

    def wait(self) -> None:
        """Wait for the step under way, see :meth:`ErrorFeedback.wait`. Collective."""
        if not self._posted:
            super().wait()  # which says that no step is under way
        problem: MpiEfError | None = None
        self.node.inside.advance(wait=True)
        self._posted = False
        try:
            super().wait()
        except MpiEfError as error:
            problem = error
        try:
            self.node.inside.settle(problem)
        except MpiEfError:
            self.rollback()
            raise

    def commit(self) -> Vector:
        """Update the state and return the result, see :meth:`ErrorFeedback.commit`. Collective over the node."""
        return self._spread(super().commit())

    def refuse(self, error: MpiEfError) -> None:
        """Take part in the next step with an error, see :meth:`ErrorFeedback.refuse`."""
        self._refusal = error

    def _given(self, vector: Vector | Combination) -> tuple[Vector | Combination, MpiEfError | None]:
        """Return what is exchanged, and why it cannot be. Local."""
        refusal, self._refusal = self._refusal, None
        x, wrong = self.node.given(vector)
        return x, refusal or wrong

    @property
    def _place(self) -> tuple[int, int]:
        return self.steps, self.plan.exchanges

    def _check_idle(self) -> None:
        if self.under_way:
            raise OptionError("ErrorFeedback: a step is under way; call wait() and commit() first")

    def before_load(self) -> None:
        """Raise while a step is under way, see :meth:`ErrorFeedback.before_load`. Local."""
        self._check_idle()

    def _spread(self, result: Vector) -> Vector:
        self._inside_nbytes += self.node.inside.sent_nbytes
        if not self._settled:
            result, self._settled = self._at_home(result), True
        return self.node.inside.spread(result)

    def _at_home(self, result: Vector) -> Vector:
        """Let the array of the state that is the result be where the node reads it, so that it is not copied. Local."""
        home = self.node.inside.home
        for name, array in vars(self.state).items():
            if home is not None and isinstance(array, np.ndarray) and array.size and same_memory(array, result):
                home[:] = array
                setattr(self.state, name, home)
                return home
        return result

    def _current(self, whole: bool) -> Plan:
        return super()._current(whole or self.node.alone)

    @property
    def prepared(self) -> bool:
        """Whether the next step builds nothing, see :attr:`ErrorFeedback.prepared`."""
        return self._dense is not None or (super().prepared and not self.node.alone)

    @property
    def between_nbytes(self) -> int:
        """Bytes that have left this rank for other nodes in all steps so far."""
        return super().sent_nbytes

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank as messages in all steps so far, those to ranks of its node included."""
        return self.between_nbytes + self._inside_nbytes

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of this rank, see :attr:`ErrorFeedback.seconds`."""
        return {name: spent + self.node.seconds[name] for name, spent in super().seconds.items()}

    def state_tree(self) -> StateTree:
        """Describe arrays, counters and options, see :meth:`ErrorFeedback.state_tree`. Local.

        Arrays are parts of one vector for each node. Nodes take the place of ranks where it goes on elsewhere: with other
        nodes each gets the mean over the old ones. Without them, or from a run without them, ranks are nodes of one.
        """
        tree, node = super().state_tree(), self.node
        leaves = {name: leaf if leaf.array is None else replace(leaf, kind=PER_RANK, reshard=self._move(leaf.reshard))
                  for name, leaf in tree.leaves.items()}
        leaves[NODES] = Leaf(REPLICATED, node.table)
        return replace(tree, leaves=leaves, place={"rank": node.rank, "size": node.size})

    def _move(self, move: Reshard | None) -> Reshard:
        part, nodes = self.node.part, self.node.table
        if move is not None and move.how == "cut":
            return replace(move, start=part.start + move.start, stop=part.start + move.stop, nodes=nodes)
        return replace(move or Reshard("mean"), start=part.start, stop=part.stop, nodes=nodes)

    def load_state_dict(self, saved: Any) -> None:
        """Restore, see :meth:`ErrorFeedback.load_state_dict`. Local; call on all ranks."""
        if not np.array_equal(saved.get("arrays", {}).get(NODES, self.node.table), self.node.table):
            raise OptionError("load_state_dict: ranks were on other nodes, or had other slices; load on the ranks and nodes "
                              "it was saved on")
        super().load_state_dict(saved)
