"""The communication hook: the rule at work under DistributedDataParallel."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from mpi_ef.collectives import Plan, PlanBuilder, build_plan, plan_for
from mpi_ef.collectives.ways import ways_of
from mpi_ef.comm.consensus import OnAllRanks, agree, ranks_text, shared_errors
from mpi_ef.compress import Compressor, for_parameters
from mpi_ef.compress.compressor import check_compressor
from mpi_ef.errors import DtypeError, NonFiniteError, OptionError, ShapeError, everywhere
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.feedback.table import Rule, rule_of
from mpi_ef.kernels.backend import side_of
from mpi_ef.statetree import LOCAL, Leaf, StateTree, attribute

from .bucket import FeedbackBucket, Place, Saved, reset, resharded
from .process_group import ProcessGroupComm

__all__ = ["FeedbackHook"]


def _on_hosts(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Return a group of the same ranks that moves CPU memory: this one, or a new one with gloo. Collective in the group.

    Where ranks of the world are not in it, torch names the new one by the number of groups that a process is in, and ranks
    that are in different numbers of them would wait for each other: they raise.
    """
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    if part := len(ranks) < dist.get_world_size():
        mine = torch.tensor([len(dist.distributed_c10d._world.pg_names)], device=device)  # noqa: SLF001
        gathered = [torch.empty_like(mine) for _ in ranks]
        dist.all_gather(gathered, mine, group)
        if len(numbers := {int(number) for number in gathered}) > 1:
            raise everywhere(OptionError(f"FeedbackHook: the ranks {ranks} are in different numbers of process groups, from "
                                         f"{min(numbers)} to {max(numbers)}, and torch can make none for them beside NCCL; "
                                         "pass process_group=dist.new_group(ranks, backend='gloo'), built by all processes"))
    beside: Any = dist.new_group(ranks, backend="gloo", use_local_synchronization=part)
    return beside  # type: ignore[no-any-return]


def _future(buffer: Tensor) -> Future[Tensor]:
    """Return a future that can be given a gradient; where it is on a GPU, whoever takes it waits for its streams."""
    return Future[Tensor](devices=[buffer.device]) if buffer.device.type == "cuda" else Future[Tensor]()


class FeedbackHook(OnAllRanks):
    """Put an error-feedback rule under DistributedDataParallel: gradients travel compressed. Construction is collective.

    ``hook = FeedbackHook(model, TopK(0.01))`` registers itself as the model's communication hook; the training loop stays as
    it is. The gradients that ``backward`` leaves are the rule's estimate of their mean over the ranks, the same bits on
    all ranks. So this is the placement "gradient" of :class:`mpi_ef.DistributedOptimizer`, for SGD-like optimizers.

    Every bucket is compressed on its own: ``TopK(0.01)`` keeps 1 % of each bucket, ``TopK(0.01, segments="parameters")``
    1 % of each parameter. Its exchange begins when the bucket is ready, and goes on while backward computes the others.
    DDP's first backward has one bucket of all parameters, and cuts them by ``bucket_cap_mb`` afterwards.

    Parameters
    ----------
    model : DistributedDataParallel
        On the CPU or on one device a rank, with parameters in float32 or float64, and without a hook.
    compressor : Compressor
    rule : str
        A name in :data:`mpi_ef.feedback.RULES`, for example "ef21", "econtrol" or "ef14".
    process_group : torch.distributed.ProcessGroup, optional
        Of the same ranks as the model's, which is the default. Where that moves no CPU memory, as with NCCL, a group with
        gloo is made beside it: only messages travel there, and they are on the host.
    plan : callable or str, optional
        Builds the collective of a bucket, see :func:`mpi_ef.collectives.build_plan`.
    dense_steps : int
        The first steps exchange whole vectors; 1 is the papers' start with the first gradient.
    **options
        Options of the rule, for example ``eta``.

    Attributes
    ----------
    comm : ProcessGroupComm
        Of these ranks.
    steps : int
        Completed steps.
    skipped_steps : int
        Backward passes that changed no state because some rank's gradient had a NaN or Inf.

    Raises
    ------
    DisagreementError
        On all ranks, when they were given different models, compressors, rules or options.
    DtypeError, OptionError
        When a parameter or an argument is not usable; ranks whose own are fine raise `PeerError`.

    Notes
    -----
    When any rank's gradient has a NaN or Inf in any bucket, all gradients become NaN on all ranks, no state changes, and
    rank 0 warns: a ``GradScaler`` or a check of your own then skips the optimizer's step everywhere.

    State belongs to parameters: when DDP rebuilds its buckets, as it does after the first backward, it is re-cut. It is in
    units of the gradient: keep the scale constant where the loss is scaled. ``clip_grad_norm_`` after backward clips the
    rule's estimate, which EF21 and EControl stand, while EF14 loses what is cut off. A parameter that no rank has used
    keeps the gradient it had, while the rule counts a zero for it.

    As a part of :class:`mpi_ef.Training` it goes on with any number of ranks, with `comm` as the communicator:
    ``Training(model=module, hook=hook).resume(store, hook.comm, policy="redistribute")``.

    Cost beyond the exchanges: one allgather of 12 bytes in every backward, before the first bucket. Memory: the state of
    the rule, and the buffers of one plan for every bucket.
    """

    def __init__(self, model: DistributedDataParallel, compressor: Compressor, *, rule: str | Rule = "ef21",
                 process_group: dist.ProcessGroup | None = None, plan: PlanBuilder = plan_for, dense_steps: int = 0,
                 **options: Any) -> None:
        if not isinstance(model, DistributedDataParallel):
            raise OptionError(f"FeedbackHook: model is a {type(model).__name__}; pass DistributedDataParallel(model)")
        group = model.process_group if process_group is None else process_group
        self.comm = ProcessGroupComm(on_hosts := _on_hosts(group, next(model.parameters()).device))
        if on_hosts is not group:  # nobody else's: a bucket need not have left a device when backward goes on
            ways_of(self.comm).queue = []
        self.compressor, self.rule, self.dense_steps, self.options = compressor, rule, dense_steps, options
        self.steps = self.skipped_steps = 0
        self._plan = plan
        self._parameters = {name: p for name, p in model.module.named_parameters()
                            if p.requires_grad and name not in model.parameters_to_ignore}
        self._names = {p: name for name, p in self._parameters.items()}
        self._buckets: dict[tuple[str, ...], FeedbackBucket] = {}
        self._loose: dict[str, Saved] = {}  # state of parameters without a bucket
        self._loose_plans: dict[tuple[str, ...], dict[str, Tensor]] = {}  # loaded, of later buckets
        self._under_way: list[tuple[FeedbackBucket, Tensor, Future[Tensor]]] = []
        self._loads = self._earlier_sent_nbytes = 0
        agree(self.comm, "FeedbackHook", lambda: self._facts(model), "build the same model and hook on every rank")
        model.register_comm_hook(self, type(self).run)

    def _facts(self, model: DistributedDataParallel) -> dict[str, object]:
        rule = rule_of(self.rule)[0]
        rule.check_names(self.options, "FeedbackHook", FeedbackHook)
        check_compressor("FeedbackHook", compressor=self.compressor)
        if self.comm.ranks != (theirs := dist.get_process_group_ranks(model.process_group)):
            raise OptionError(f"FeedbackHook: process_group has the ranks {self.comm.ranks}, the model's {theirs}; pass one "
                              "of the same ranks")
        for name, p in self._parameters.items():
            if p.dtype not in (torch.float32, torch.float64) or p.device.type == "meta":
                raise DtypeError(f"FeedbackHook: parameter {name} is {p.dtype} on {p.device}; make it torch.float32 or "
                                 "torch.float64 on the CPU or a device")
        parameters = {f"parameter {name}": f"{tuple(p.shape)} {p.dtype}" for name, p in self._parameters.items()}
        return {"the names of the parameters": list(self._parameters), **parameters, "compressor": self.compressor,
                "rule": rule.name, "dense_steps": self.dense_steps, "options": self.options}

    def run(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Start the step of one bucket; with the last one, finish those of all. DDP calls this. Collective.

        Raises
        ------
        DisagreementError
            On all ranks, when state was loaded on some of them only.
        """
        if bucket.index() == 0:
            self._begin()
        buffer = bucket.buffer()
        if buffer.layout is not torch.strided:
            raise DtypeError(f"FeedbackHook: a gradient is {buffer.layout}; take dense ones (sparse=False in embeddings)")
        names = tuple(self._names[p] for p in bucket.parameters())
        if names not in self._buckets:
            self._build(names, buffer, bucket.gradients())
        known, future = self._buckets[names], _future(buffer)
        known.feedback.start(known.vector(buffer))
        self._under_way.append((known, buffer, future))
        known.feedback.progress()
        if bucket.is_last():
            self._commit()
        return future

    def _begin(self) -> None:
        """Make sure that all ranks are about to do the same. Collective."""
        facts = {"completed steps": self.steps, "skipped steps": self.skipped_steps, "times loaded": self._loads}
        answers = np.empty((self.comm.Get_size(), len(facts)), np.uint32)
        self.comm.Allgather(np.array(list(facts.values()), np.uint32), answers)
        if (answers != answers[0]).any():
            agree(self.comm, "FeedbackHook", lambda: facts, "load its state on all ranks or on none")

    def _build(self, names: tuple[str, ...], buffer: Tensor, gradients: list[Tensor]) -> None:
        """Put the rule to work on a bucket that was not seen before, with the state of its parameters. Collective."""
        for old in [old for old in self._buckets if not set(old).isdisjoint(names)]:
            left = self._buckets.pop(old)
            self._loose |= left.state()
            self._earlier_sent_nbytes += left.feedback.sent_nbytes
        compressor = for_parameters(self.compressor, [tuple(g.shape) for g in gradients])
        with shared_errors(self.comm, "FeedbackHook", Plan.built):
            dtype = np.dtype(str(buffer.dtype).removeprefix("torch."))
            device = side_of(buffer.device.type, buffer.device.index)
            plan = build_plan(self._plan, self.comm, compressor, buffer.numel(), dtype, device,
                              gather=rule_of(self.rule)[0].gathers)
        feedback = ErrorFeedback(self.rule, plan, dense_steps=self.dense_steps, **self.options)
        places = [Place.of_parameter(name, self._parameters[name], int(g.storage_offset() - buffer.storage_offset()))
                  for name, g in zip(names, gradients, strict=True)]
        fresh = FeedbackBucket(feedback, places)
        if self._loose:
            fresh.fill(self._loose, self._loose_plans.pop(names, {}))
            for name in names:
                del self._loose[name]
        self._buckets[names] = fresh

    def _commit(self) -> None:
        """Wait for the messages of all buckets, then update all states or none, and hand the gradients on. Collective."""
        under_way, self._under_way = self._under_way, []
        broken: set[int] | None = None
        for bucket, _, _ in under_way:
            try:
                bucket.feedback.wait()
            except NonFiniteError as error:
                broken = (broken or set()) | set(error.ranks)
        for bucket, buffer, _ in under_way:
            if broken is None:
                bucket.vector(buffer)[:] = bucket.feedback.commit()
            else:
                bucket.feedback.rollback()
                buffer.detach().fill_(torch.nan)
        self.steps, self.skipped_steps = self.steps + (broken is None), self.skipped_steps + (broken is not None)
        for _, buffer, future in under_way:
            future.set_result(buffer)
        if broken is not None and self.comm.Get_rank() == 0:
            where = f" on {ranks_text(sorted(broken))}" if broken else ""
            warnings.warn(f"step {self.steps}: NaN or Inf in the gradient{where}; all gradients are NaN on all ranks now, "
                          "so skip the optimizer's step", RuntimeWarning, stacklevel=2)

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank in all steps so far, see :class:`mpi_ef.collectives.Traffic`."""
        return self._earlier_sent_nbytes + sum(bucket.feedback.sent_nbytes for bucket in self._buckets.values())

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all state of this rank, tensors by parameter and array. Local; save it on every rank."""
        state, plans = dict(self._loose), dict(self._loose_plans)
        for names, bucket in self._buckets.items():
            state |= bucket.state()
            plans[names] = bucket.plan_state()
        return {**self._described().state_dict(),
                "parameters": {name: state[name] for name in self._parameters if name in state},
                "plans": [{"bucket": list(names), "arrays": plan} for names, plan in plans.items() if plan]}

    def _described(self) -> StateTree:
        """Describe what of the state belongs to no parameter."""

        def write(nbytes: int) -> None:
            self._earlier_sent_nbytes = nbytes

        sent = Leaf(LOCAL, read=lambda: self.sent_nbytes, write=write, default=0)
        return StateTree({"steps": attribute(self, "steps"), "skipped_steps": attribute(self, "skipped_steps"),
                          "sent_nbytes": sent},
                         identity={"rule": rule_of(self.rule)[0].name, "compressor": str(self.compressor)},
                         place={"rank": self.comm.Get_rank(), "size": self.comm.Get_size()})

    def state_dict_from(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        """Return what rank `rank` of `size` loads to go on where another number of ranks has been. Local.

        Errors and momenta are the mean of the old ranks' then, estimates the aggregate and what plans owe of it, residuals
        are re-cut: what the rules rely on stays what it was. `sent_nbytes` begins at 0. `Training` calls this.

        Parameters
        ----------
        states : sequence of mapping
            What :meth:`state_dict` returned on all old ranks, in rank order. Read one array after the other: mappings that
            load at access will do.
        rank, size : int
            Of the group that goes on.

        Returns
        -------
        dict
            Load it with :meth:`load_state_dict` on that rank, all ranks before the same backward. It may share tensors
            with `states`.
        """
        first = states[0]
        parameters = {name: {**saved, "arrays": resharded([s["parameters"][name]["arrays"] for s in states], first["rule"],
                                                          rank)}
                      for name, saved in first["parameters"].items()}
        return {**first, "rank": rank, "size": size, "sent_nbytes": 0, "parameters": parameters}

    def forget(self) -> None:
        """Set errors, residuals and estimates to what they are at the start; momenta stay. Local; call on all ranks.

        Between two steps. A rule with estimates does its dense steps again.
        """
        saved = self.state_dict()
        parameters = {name: reset(of_parameter, self.rule) for name, of_parameter in saved["parameters"].items()}
        self.load_state_dict(saved | {"parameters": parameters})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned on the same rank of a group of the same size. Local; call on all ranks.

        Before the first backward or later; the buckets need not be those of then. Parameters are not part of it.
        What another number of ranks has saved goes through :meth:`state_dict_from` first.

        Raises
        ------
        OptionError, ShapeError
            When it belongs to another rule, compressor, rank, group size or model; nothing is changed then.
        """
        self._described().check(saved)
        state: dict[str, Saved] = saved["parameters"]
        if state and state.keys() != self._parameters.keys():
            name = min(state.keys() ^ self._parameters.keys())
            where = "saved state" if name in state else "model"
            raise OptionError(f"load_state_dict: parameter {name} is in the {where} only; load into the model it was saved "
                              "from")
        for name, of_parameter in state.items():
            p = self._parameters[name]
            for array, tensor in of_parameter["arrays"].items():
                if tensor.shape != p.shape or tensor.dtype != p.dtype:
                    raise ShapeError(f"load_state_dict: {array} of {name} is {tuple(tensor.shape)} {tensor.dtype}, here it "
                                     f"is {tuple(p.shape)} {p.dtype}; load into the model it was saved from")
        self._buckets, self._loose, self._loads = {}, dict(state), self._loads + 1
        self._loose_plans = {tuple(plan["bucket"]): plan["arrays"] for plan in saved["plans"]}
        self._described().load_values(saved)
