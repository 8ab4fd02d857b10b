"""A rule at work: state and plan bound together, dense first steps, saving and loading."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from textwrap import fill
from types import MethodType
from typing import Any, ClassVar

from mpi_ef.collectives import Offer, Plan
from mpi_ef.comm.consensus import OnAllRanks, agree
from mpi_ef.compress.combination import Combination, Vector
from mpi_ef.errors import MpiEfError, OptionError, briefly, counted, shortage, told
from mpi_ef.ranges import whole
from mpi_ef.statetree import LOCAL, PER_RANK, REPLICATED, Leaf, Reshard, Stateful, StateTree, attribute

from .state import Steps, form, of_broken
from .table import RULES, Rule, rule_of, with_momentum

__all__ = ["ErrorFeedback"]


def _offered(plan: Plan, vector: Vector | Combination) -> Steps:
    """Return a step whose message the plan refuses."""
    yield plan.offer(vector)
    raise AssertionError


class ErrorFeedback(OnAllRanks, Stateful):
    """A rule at work: its state on this rank, and the plan through which it exchanges. Construction is collective.

    Parameters
    ----------
    rule : str or Rule
        The name of a line in :data:`RULES`, ``"ef21"``, also with options, ``"econtrol(eta=0.1)"``; of a rule in an
        installed package, or in a module, ``"module:name"``; or a rule of your own.
    plan : Plan
        Any plan with any compressor.
    dense_steps : int
        The first steps exchange whole vectors. 1 gives the start with the first gradient: g_i^0 = grad f_i(x^0) for
        EF21, h_i^0 = grad f_i(x^0) for EControl; 0 starts from zero. Averages begin with the first vector in both.
    momentum : float, optional
        Of any rule, in [0, 1): it exchanges an average of the vectors that it is given, see :func:`with_momentum`.
    eta : float, optional
        Strength of EControl's feedback, in [0, 1]; 0.3 times the contraction constant of the plan by default, which
        must then be at least 1e-4: the worst case of Sign over a long vector is no guide.

    Attributes
    ----------
    steps : int
        Completed steps.
    resting : sequence of slice
        Entries, in order, that have no vector on any rank in the next step: averages of theirs do not begin with its zeros.
        The same on all ranks.

    Notes
    -----
    A non-finite vector on any rank raises `NonFiniteError` on all of them and leaves every state as it was.
    """

    first = 0  # the entry of the vector at which the arrays of this rank begin
    row: Any = None  # memory from which this rank's vector need not be copied
    of_node = False  # whether they are those of several ranks, of its node
    _kinds: ClassVar[dict[type[Plan], type[Any]]] = {}  # by the plan through which they work

    def __init_subclass__(cls, *, through: type[Plan] | None = None) -> None:
        super().__init_subclass__()
        if through is not None:
            ErrorFeedback._kinds[through] = cls

    def __new__(cls, rule: object = None, plan: object = None, **_: object) -> Any:  # noqa: ARG004
        """Return an object of the kind that works through such a plan. Local."""
        kinds = (kind for through, kind in ErrorFeedback._kinds.items() if isinstance(plan, through))
        return super().__new__(next(kinds, cls) if cls is ErrorFeedback else cls)

    def __init__(self, rule: str | Rule, plan: Plan, *, dense_steps: int = 0, **options: Any) -> None:
        if not isinstance(plan, Plan):
            raise OptionError(f"ErrorFeedback: plan={briefly(plan)} is no plan; pass for example GatherMean(comm, "
                              "TopK(0.01), d)")
        self.plan, self.dense_steps, self.steps = plan, dense_steps, 0
        self.resting: Sequence[slice] = ()

        def facts() -> dict[str, object]:
            self.rule, specified = rule_of(rule)
            if "momentum" in specified | options:
                self.rule = with_momentum(self.rule)
            whole("ErrorFeedback", 0, "0 starts compressed", dense_steps=dense_steps)
            self.rule.check_names(options, "ErrorFeedback", ErrorFeedback)
            self.options = self.rule.options_for(self._alpha(plan), specified | options)
            self.state = self.rule.state.zeros(plan, **self.options)
            return {"rule": self.rule.name, "dense_steps": dense_steps, "options": self.options}

        agree(plan.comm, "ErrorFeedback", facts, "build it from the same arguments everywhere")
        self._dense: Plan | None = None
        self._formed: Vector | None = None  # a combination, overwritten by the next one
        self._inputs: dict[str, Any] = {}
        self._under_way: tuple[Steps, Plan] | None = None
        self._late = ""  # after the step under way
        self._dense_sent_nbytes = 0
        self._dense_seconds = dict.fromkeys(plan.seconds, 0.0)

    def _alpha(self, plan: Plan) -> float:
        """Return the contraction constant from which options follow."""
        return plan.alpha

    def __repr__(self) -> str:
        """Return the rule with its options, the compressor and the plan. Local."""
        plain = {f.name: f.default for f in fields(self.rule.state) if not f.repr}
        options = ", ".join(f"{name}={value}" for name, value in self.options.items() if value != plain.get(name, ...))
        return (f"{self.rule.name}{f'({options})' if options else ''} with {self.plan.compressor} through "
                f"{type(self.plan).__name__} on {counted(self.plan.size, 'rank')}")

    def step(self, vector: Vector | Combination, *, whole: bool = False, **inputs: Any) -> Vector:
        """Exchange this rank's vector and return the rule's result, the same bits on all ranks. Collective.

        Parameters
        ----------
        vector : (d,) of the plan's dtype, contiguous, this rank's gradient or update, read only; those of all its
            clients, (own, d) or (own * d,), with :class:`ClientsMean`; or a combination of such vectors, ``lazy(a) - b``,
            which the rule forms while it encodes where it takes so many (`Rule.most_terms`), with the same bits
        whole : bool
            This step exchanges whole vectors, as the first `dense_steps` do. The same on all ranks.
        inputs
            What else the rule wants: ``full=`` of EF21-PAGE.

        Returns
        -------
        (d,) array
            Owned by the rule, valid until the next step; read only. On a device a `DeviceArray`: its attribute
            ``tensor`` is a tensor over the same memory.

        Raises
        ------
        NonFiniteError
            On all ranks, with all state as before.
        ShapeError, DtypeError
            On a rank whose vector does not fit; all other ranks raise `PeerError`.
        """
        steps, offer = self._begun(vector, whole, inputs)
        return self._commit(steps, offer.exchange())

    def tell(self, *, whole: bool = False, **inputs: Any) -> None:
        """Say what the next step is to know besides the vector, where something else makes it, an optimizer for example.

        Parameters and inputs of :meth:`step`, for one step. Local; alike on all ranks; with overlap before its backward.

        Raises
        ------
        OptionError
            A step is under way.
        """
        self.before_load()
        self._inputs = {"whole": whole, **inputs}

    def refuse(self, error: MpiEfError) -> None:
        """Take part in the next step with an error in place of a message: all ranks raise there. Collective, as the step."""
        self._current(bool(self._inputs.get("whole"))).refuse(error)

    @property
    def prepared(self) -> bool:
        """Whether the next step builds nothing, which would be collective. The same on all ranks."""
        return self._dense is not None or not (self._inputs.get("whole") or self.steps < self.dense_steps)

    @property
    def under_way(self) -> bool:
        """Whether a step was started, and not committed or rolled back."""
        return self._under_way is not None

    def start(self, vector: Vector | Combination) -> None:
        """Begin a step: the vector may be changed as soon as this returns. :meth:`wait` and :meth:`commit` follow.

        Collective; all ranks split a step, or none does. See :meth:`Plan.start`.
        """
        steps, offer = self._begun(vector, whole=False, inputs={})
        offer.start()
        self._under_way = steps, offer.plan

    def progress(self) -> None:
        """Let MPI work on the step under way. Local."""
        if self._under_way is not None:
            self._under_way[1].progress()

    def wait(self) -> None:
        """Wait for the messages of the step under way. Collective.

        No state changes: when this raises, here or in another one of several buckets, :meth:`rollback` leaves everything as
        it was.

        Raises
        ------
        As :meth:`step`.
        """
        if self._under_way is None:
            raise OptionError("ErrorFeedback: no step is under way; call start(vector) first")
        try:
            self._under_way[1].wait()
        except BaseException:
            self._under_way = None
            raise

    def rollback(self) -> None:
        """Forget the step under way, whose messages have arrived, if there is one: all state is as before. Local."""
        if self._under_way is not None:
            self._under_way[1].undo()
            self._under_way = None

    def commit(self) -> Vector:
        """Update the state with the messages that have arrived and return what :meth:`step` returns. Local.

        Collective with rules that send a second message.
        """
        if self._under_way is None:
            raise OptionError("ErrorFeedback: no step is under way; call start(vector) and wait() first")
        (steps, plan), self._under_way = self._under_way, None
        return self._commit(steps, plan)

    def _begun(self, vector: Vector | Combination, whole: bool, inputs: dict[str, Any]) -> tuple[Steps, Offer]:
        """Return a step and its first message; where this rank fails before that, one that says so to all ranks."""
        inputs, self._inputs = self._inputs | inputs, {}
        plan = self._current(inputs.pop("whole", False) or whole)
        try:
            steps = self._steps(plan, vector, inputs)
            return steps, self._asked(steps)
        except Exception as error:
            if isinstance(error, MpiEfError):
                plan.refuse(error)
            else:
                refusal = shortage(self._subject, error) or OptionError(f"{self._subject}: {told(error)}")
                refusal.__cause__ = error
                plan.refuse(refusal)
        return _offered(plan, vector), plan.offer(vector)

    def _steps(self, plan: Plan, vector: Vector | Combination, inputs: dict[str, Any]) -> Steps:
        self.state.whole, self.state.draw = plan is self._dense, self.plan.exchanges + self.dense_steps
        self._late = self.state.begin(plan, self.resting)
        if isinstance(vector, Combination):
            if not all(term.shape == (plan.own_d,) and term.dtype == plan.dtype for _, term in vector.terms):
                return _offered(plan, vector)  # which raises, as below
            if len(vector.terms) > self.rule.most_terms:
                if self._formed is None:
                    self._formed = plan.zeros(plan.own_d)
                vector = form(vector, into=self._formed)
            return self.rule.step(self.state, plan, vector, **inputs)
        x = plan.array(vector)
        if getattr(x, "shape", None) == (plan.own, plan.d) and hasattr(x, "flags") and x.flags.c_contiguous:
            x = x.reshape(-1)
        if plan.misfit(x, "", ""):
            return _offered(plan, x)  # raises here what is wrong, and PeerError on all other ranks
        return self.rule.step(self.state, plan, x, **inputs)

    def _asked(self, steps: Steps) -> Offer:
        """Return the first message of a step. Local."""
        if not isinstance(steps, Generator):
            raise OptionError(f"{self._subject}: it returned {briefly(steps)} without a yield; yield plan.offer(vector)")
        try:
            return self._checked(next(steps))
        except StopIteration:
            raise OptionError(f"{self._subject}: a step has ended without a message; yield plan.offer(vector)") from None

    def _checked(self, offer: Offer) -> Offer:
        if not isinstance(offer, Offer):
            raise OptionError(f"{self._subject}: it yields {briefly(offer)}; yield plan.offer(vector)")
        return offer

    @property
    def _subject(self) -> str:
        return f"rule {self.rule.name}"

    def _commit(self, steps: Steps, plan: Plan) -> Vector:
        before = of_broken(self.state, plan)
        try:
            while True:
                plan = self._checked(steps.send(plan)).exchange()
        except StopIteration as end:
            result: Vector = end.value
        for name, place, was in before:
            getattr(self.state, name)[place] = was
        if problem := self.plan.misfit(result, self._subject, "its result", self.plan.d):
            raise problem
        result = result.view()
        self.steps += 1
        self.state.late = self._late
        if self.resting:
            self.plan.forget()  # arrays get back what they were there
        result.flags.writeable = False
        return result

    def _current(self, whole: bool) -> Plan:
        """Return the plan of the next step. The dense one, which holds several vectors, exists while it is needed."""
        if whole or self.steps < self.dense_steps:
            self.plan.forget()
            if self._dense is None:
                self._dense = self.plan.dense()
            self._dense.exchanges = self.steps  # as after a step that was loaded
            return self._dense
        if self.steps == self.dense_steps:
            self._retire_dense()
        return self.plan

    def _retire_dense(self) -> None:
        """Let go of the dense plan, but not of its account."""
        if self._dense is not None:
            self._dense_sent_nbytes += self._dense.all_sent_nbytes
            for name, spent in self._dense.seconds.items():
                self._dense_seconds[name] += spent
            self._dense = None

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank in all steps so far, see :class:`Traffic`."""
        return self._dense_nbytes() + self.plan.all_sent_nbytes

    def _dense_nbytes(self) -> int:
        return self._dense_sent_nbytes + (self._dense.all_sent_nbytes if self._dense else 0)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of this rank in "encode", "communicate" and "decode", over all steps so far."""
        plans = [self.plan, self._dense] if self._dense else [self.plan]
        return {name: spent + sum(plan.seconds[name] for plan in plans) for name, spent in self._dense_seconds.items()}

    def state_tree(self) -> StateTree:
        """Describe arrays, the plan's included, counters and options. Local.

        On another number of ranks clients' arrays move with their client; of others the mean over the ranks stays what it
        was, that of the estimates equal to its aggregate, and what the plan owes of it, to the last bit; residuals of chunks
        are cut again.
        """
        plan, share, of_plan = self.plan, self.plan.share, self.plan.leaves()
        own = self.state.leaves()
        for name, leaf in own.items():
            if (move := leaf.reshard) is not None and move.how in ("mean", "copy"):
                owed = f"plan.{move.owed}" if move.owed else ""
                anew = Reshard("repeat", stop=plan.own_d)  # zeros: in a mean those of a wrong rank would be
                move = anew if move.how == "mean" and plan.broken is not None else replace(move, owed=owed)
                own[name] = replace(leaf, reshard=share or move)
        if "residual" not in of_plan and share is None and (heir := self.state.heir()):
            own[heir] = replace(own[heir], inherits="plan.residual")
        resets = any(leaf.resets for leaf in own.values())
        of_plan = {f"plan.{k}": replace(leaf, resets=resets and leaf.kind == PER_RANK) for k, leaf in of_plan.items()}
        values = {
            "steps": attribute(self, "steps", resets=self.state.estimates()),
            "exchanges": attribute(plan, "exchanges"),
            "options": Leaf(REPLICATED, read=self._plain_options, write=self._set_options),
            "sent_nbytes": Leaf(LOCAL, read=lambda: plan.all_sent_nbytes, write=self._set_sent_nbytes, default=0),
            "dense_sent_nbytes": Leaf(LOCAL, read=self._dense_nbytes, write=self._set_dense_nbytes, default=0),
        }
        if self.state.averages():  # in states of earlier versions they have begun, with a part of the first vector
            values["late"] = attribute(self.state, "late", default="")
        objects = {name: str(option) for name, option in self.options.items() if not isinstance(option, int | float)}
        clients = {} if share is None else {"clients": str(plan.clients)}
        identity = {"rule": self.rule.name, "plan": plan.saved_as, "compressor": str(plan.compressor)}
        return StateTree(own | of_plan | values, identity=identity | clients | objects,
                         place={"rank": plan.rank, "size": plan.size})

    def _plain_options(self) -> dict[str, Any]:
        return {name: option for name, option in self.options.items() if isinstance(option, int | float)}

    def _set_options(self, options: Mapping[str, Any]) -> None:
        self.options |= options
        for name, option in self.options.items():
            setattr(self.state, name, option)

    def _set_sent_nbytes(self, nbytes: int) -> None:
        self.plan.sent_nbytes += nbytes - self.plan.all_sent_nbytes  # companions keep theirs

    def _set_dense_nbytes(self, nbytes: int) -> None:
        self._dense, self._dense_sent_nbytes = None, nbytes

    def before_load(self) -> None:
        """Raise while a step is under way, which has been sent with what there was. Local."""
        if self._under_way is not None:
            raise OptionError("ErrorFeedback: a step is under way, sent with what there was (with overlap=True in the "
                              "backward pass); load, forget or tell after step(), or before the backward pass")

    def loaded(self) -> None:
        """Let the next step write its result afresh: the arrays are others. Local."""
        self.plan.forget()
        self.plan.loaded()

    def forget(self) -> None:
        """Set errors, residuals and estimates to what they are at the start; momenta stay. Local, alike on all ranks.

        A rule with estimates does its dense steps again.
        """
        self.before_load()
        self.state_tree().reset()
        self.loaded()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all arrays, in NumPy, and plain numbers and texts of this rank. Local."""
        return self.state_tree().state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned on the same rank of a world of the same size. Local; call on all ranks.

        Raises
        ------
        OptionError
            When it belongs to another rule, plan, compressor, rank or world size, or a step is under way; nothing is changed
            then.
        ShapeError
            When an array has another shape or dtype; nothing is changed then.
        """
        self.before_load()
        tree = self.state_tree()
        tree.check(saved)
        tree.load_values(saved)
        tree.load_arrays(saved)
        self.loaded()


ErrorFeedback.__signature__ = signature(MethodType(ErrorFeedback.__init__, ErrorFeedback))  # type: ignore[attr-defined]
if ErrorFeedback.__doc__:  # None with python -OO
    said = fill(f"Rules: {', '.join(RULES)}.", 116, initial_indent="    ", subsequent_indent="    ")
    ErrorFeedback.__doc__ += f"\n{said}\n"
