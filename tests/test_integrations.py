"""Loops of other libraries with stand-ins for these; with the real ones on real ranks: tests/launch/test_loops.py."""

import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import ClassVar, NamedTuple

import pytest
import torch
from virtual import results, run

from mpi_ef import DistributedOptimizer, TopK
from mpi_ef.errors import CheckpointError, DisagreementError, OptionError
from mpi_ef.integrations import collect, one_process, prepare_accelerator, prepare_trainer, processes


class Pair(NamedTuple):
    x: object
    y: object


def stand_in(monkeypatch, name, **content):
    """Put a module there, and those it lies in."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules or depth == len(parts):
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


class SecondOfTwo:
    """A communicator's end, of which no other is there."""

    def __init__(self):
        self.barriers = 0

    def Get_rank(self):
        return 1

    def Get_size(self):
        return 2

    def allgather(self, value):
        self.barriers += 1
        return [value, value]


def partial_state(count):
    class PartialState:
        shared: ClassVar = {}

        def __init__(self, cpu):
            self.__dict__ = self.shared
            self.num_processes, self.process_index, self.local_process_index = count, 0, 0

        def split_between_processes(self, inputs, apply_padding=False):
            return inputs[self.process_index :: self.num_processes]

    return PartialState


def test_the_launcher_is_hidden_and_the_batch_job_is_not(monkeypatch):
    state = partial_state(1)
    stand_in(monkeypatch, "accelerate.state", PartialState=state)
    stand_in(monkeypatch, "accelerate.accelerator", prepare_data_loader=lambda loader, **options: (loader, options))
    environment = dict.fromkeys(processes.HIDDEN, "2") | {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "9", "PMIX_RANK": "1"}
    comm = SecondOfTwo()
    one_process(comm, environment)
    assert environment == {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "9", "PMIX_RANK": "1", "ACCELERATE_USE_CPU": "true"}
    assert state.shared == {"num_processes": 1, "process_index": 1, "local_process_index": 1}
    anywhere = object.__new__(state)
    anywhere.wait_for_everyone()
    assert comm.barriers == 1
    assert anywhere.on_main_process(lambda: "done")() is None
    one_process(comm, environment)  # once more, as MpiStrategy does
    assert anywhere.split_between_processes([5, 6, 7]) == [6]
    with pytest.raises(OptionError, match="apply_padding=True with a tensor"):
        anywhere.split_between_processes(torch.ones(3), apply_padding=True)
    prepare = sys.modules["accelerate.accelerator"].prepare_data_loader
    assert prepare("loader", dispatch_batches=None, seed=1) == ("loader", {"dispatch_batches": False, "seed": 1})


def test_accelerate_that_has_looked_already_is_one_line(monkeypatch):
    stand_in(monkeypatch, "accelerate.state", PartialState=partial_state(2))
    with pytest.raises(OptionError, match="accelerate has 2 processes already; call one_process before"):
        one_process(SecondOfTwo(), {})


def test_torch_distributed_that_has_been_started_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    environment = {"WORLD_SIZE": "2"}
    with pytest.raises(OptionError, match="FeedbackHook"):
        one_process(SecondOfTwo(), environment)
    assert environment == {"WORLD_SIZE": "2"}


def test_nothing_of_accelerate_is_needed(monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "accelerate", raising=False)
    one_process(SecondOfTwo(), environment := {"PMI_SIZE": "2"})
    assert environment == {"ACCELERATE_USE_CPU": "true"}


def test_tensors_of_all_ranks_nested_as_they_come():
    def program(comm):
        r = comm.Get_rank()
        value = {"a": Pair(torch.full((1 + r,), float(r)), torch.tensor(r)), "b": ["text", torch.tensor([[r]])]}
        return collect.gathered(value, comm)

    for whole in results(3, program):
        assert isinstance(whole["a"], Pair)
        assert whole["a"].x.tolist() == [0, 1, 1, 2, 2, 2]
        assert whole["a"].y.tolist() == [0, 1, 2]
        assert whole["b"][0] == "text"
        assert whole["b"][1].tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 6.0), ("mean", 2.0), ("min", 1.0), ("max", 3.0)])
def test_tensors_reduced(reduction, expected):
    whole = results(3, lambda comm: collect.reduced([torch.tensor(1.0 + comm.Get_rank())], comm, reduction, 0.5))
    assert [float(x) for (x,) in whole] == [expected / 2] * 3
    counts = results(2, lambda comm: collect.reduced(torch.tensor(comm.Get_rank()), comm, reduction))
    assert float(counts[0]) == float(counts[1]) == {"sum": 1, "mean": 0.5, "min": 0, "max": 1}[reduction]


def test_reductions_that_are_none():
    assert results(2, lambda comm: collect.reduced(comm.Get_rank(), comm, "none")) == [0, 1]
    assert all(isinstance(error, OptionError) for error in run(2, lambda comm: collect.reduced(torch.ones(1), comm, "prod")))


def test_tensors_padded_to_the_longest():
    def program(comm):
        r = comm.Get_rank()
        wide = collect.padded([torch.ones(1, 1 + r), torch.tensor(5), "text"], comm, 1, -100)
        first = collect.padded({"x": Pair(torch.ones(1 + r), 0)}, comm, pad_first=True)
        return wide[0].tolist(), wide[1].tolist(), wide[2], first["x"].x.tolist()

    assert results(2, program) == [([[1, -100]], 5, "text", [0, 1]), ([[1, 1]], 5, "text", [1, 1])]


def training(comm):
    """Return a model with BatchNorm's statistics, and an optimizer whose state differs between ranks."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, DistributedOptimizer(adam, comm, TopK(0.2), model=model)


def take_steps(model, optimizer, comm, steps):
    for step in range(steps):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * step + comm.Get_rank()))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


class Accelerator:
    num_processes = 1

    def __init__(self, comm):
        self.process_index = comm.Get_rank()
        self.optimizer = None

    def save_state(self, output_dir=None):
        return output_dir

    def gather_for_metrics(self, input_data, use_gather_object=False):
        return self.gather(input_data)[:1]  # as it cuts off what one process has twice

    def load_state(self, input_dir=None):
        self.optimizer.load_state_dict({"of": "rank 0, as accelerate reads it"})


def test_an_accelerator_saves_and_loads_what_each_rank_has(tmp_path):
    def program(comm):
        model, optimizer = training(comm)
        accelerator = Accelerator(comm)
        accelerator.optimizer = optimizer
        prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
        take_steps(model, optimizer, comm, 3)
        assert accelerator.save_state(str(tmp_path / "one")) == str(tmp_path / "one")
        went_on = take_steps(model, optimizer, comm, 3)
        accelerator.load_state(str(tmp_path / "one"))
        return all(torch.equal(*pair) for pair in zip(went_on, take_steps(model, optimizer, comm, 3), strict=True))

    assert results(2, program) == [True, True]


def test_an_accelerator_collects_over_the_ranks():
    def program(comm):
        model, optimizer = training(comm)
        accelerator, r = Accelerator(comm), comm.Get_rank()
        prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
        x = torch.tensor([r])
        return (accelerator.gather(x).tolist(), accelerator.gather_for_metrics((x,))[0].tolist(),
                accelerator.gather_for_metrics(["a"] * r), accelerator.gather_for_metrics(["a", r]),
                accelerator.gather_for_metrics(r, use_gather_object=True), accelerator.reduce(x).tolist(),
                accelerator.pad_across_processes(torch.ones(1 + r)).numel())

    assert results(2, program) == [([0, 1], [0, 1], ["a"], ["a", 0, "a", 1], [0, 1], [1], 2)] * 2


@pytest.mark.parametrize("call", ["gather", "reduce"])
def test_what_cannot_be_gathered_is_one_line(call):
    def program(comm):
        model, optimizer = training(comm)
        accelerator = Accelerator(comm)
        prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
        getattr(accelerator, call)([torch.ones(1), {"x": "text"}])

    for error in run(2, program):
        assert isinstance(error, OptionError)
        assert str(error).startswith(f"{call}: 'text' is no tensor; gather_for_metrics takes")


def test_a_save_that_one_rank_is_not_in_is_one_line_on_all(tmp_path):
    """As where one rank has a batch more to evaluate: it waited for ever."""
    def program(comm):
        model, optimizer = training(comm)
        accelerator = Accelerator(comm)
        prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
        if comm.Get_rank() == 0:
            accelerator.gather(torch.ones(1))
        else:
            accelerator.save_state(str(tmp_path))

    for error in run(2, program):
        assert isinstance(error, DisagreementError)
        assert "gather on rank 0; save_state on rank 1" in str(error)


@pytest.mark.parametrize("alike", [True, False])
def test_ranks_that_begin_with_the_same_batch_are_told_once(alike):
    def program(comm):
        model, optimizer = training(comm)
        prepare_accelerator(Accelerator(comm), comm, model=model, optimizer=optimizer)
        if not alike:
            take_steps(model, optimizer, comm, 2)
        for _ in range(2):
            model(torch.ones(6, 4)).square().mean().backward()
            optimizer.step()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results(2, program)
    lines = [str(warning.message) for warning in caught if "same batch" in str(warning.message)]
    assert len(lines) == alike
    assert all(line.startswith("accelerate: all 2 ranks began with the same batch") for line in lines)


def test_a_rank_without_any_data_is_not_waited_for_in_the_first_step():
    def program(comm):
        model, optimizer = training(comm)
        prepare_accelerator(Accelerator(comm), comm, model=model, optimizer=optimizer)
        with optimizer.join():
            take_steps(model, optimizer, comm, comm.Get_rank())
        return optimizer.steps

    assert results(2, program) == [1, 1]


def test_loading_what_is_no_state_of_ranks_is_one_line_on_all(tmp_path):
    def program(comm, folder):
        model, optimizer = training(comm)
        accelerator = Accelerator(comm)
        accelerator.optimizer = optimizer
        prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
        accelerator.load_state(folder)

    for error in run(2, lambda comm: program(comm, tmp_path)):
        assert isinstance(error, CheckpointError)
        assert "there is no state of the ranks" in str(error)
    assert all(isinstance(error, OptionError) for error in run(1, lambda comm: program(comm, None)))


@pytest.mark.parametrize("prepare", [prepare_accelerator, prepare_trainer])
def test_an_accelerator_of_other_processes_is_one_line(prepare):
    def program(comm):
        model, optimizer = training(comm)
        accelerator = Accelerator(comm)
        accelerator.process_index = 0  # as where one_process was not called
        if prepare is prepare_trainer:
            prepare(SimpleNamespace(accelerator=accelerator, optimizer=optimizer), comm)
        else:
            prepare(accelerator, comm, model=model, optimizer=optimizer)

    error = run(2, program)[1]
    assert isinstance(error, OptionError)
    assert "is process 0 of 1, and this is rank 1; call one_process(comm) first" in str(error)


def test_an_optimizer_that_exchanges_nothing_is_one_line():
    def program(comm):
        model = torch.nn.Linear(2, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        prepare_accelerator(Accelerator(comm), comm, model=model, optimizer=sgd)

    (error,) = run(1, program)
    assert isinstance(error, OptionError)
    assert "its optimizer is SGD, so that every rank would train alone" in str(error)


class Wrapping(torch.optim.Optimizer):
    """As accelerate's and Lightning's are."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Trainer:
    """The order of calls of Hugging Face's, and nothing else."""

    def __init__(self, comm, callback=None, *, batches=4, log_every=1):
        self.model, self.flat = training(comm)
        self.optimizer, self.accelerator, self.comm = Wrapping(self.flat), Accelerator(comm), comm
        self.callback_handler = SimpleNamespace(callbacks=[callback] if callback else [], train_dataloader=range(batches))
        self.callback_handler.add_callback = self.callback_handler.callbacks.append
        self.gather_function = self.accelerator.gather_for_metrics
        self.train_dataset = range(batches)
        self.args = SimpleNamespace(gradient_accumulation_steps=1, seed=3)
        self.state = SimpleNamespace(global_step=0, max_steps=8, num_train_epochs=2, log_history=[])
        self.control = SimpleNamespace(should_training_stop=False, should_epoch_stop=False, should_save=False,
                                       should_evaluate=False, should_log=False)
        self.files, self.log_every = [], log_every

    def add_callback(self, callback):
        self.callback_handler.add_callback(callback)

    def tell(self, event, **more):
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, event):
                getattr(callback, event)(self.args, self.state, self.control, **more)

    def _save_optimizer_and_scheduler(self, output_dir):
        self.files.append("optimizer")

    def _save_rng_state(self, output_dir):
        self.files.append("random")

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            self.flat.load_state_dict({"of": "rank 0"})

    def _load_rng_state(self, checkpoint):
        torch.manual_seed(0)  # that of rank 0

    def train(self, out=None, resume=None):
        self._load_optimizer_and_scheduler(resume)
        self.state.global_step = 4 if resume else 0
        self.tell("on_train_begin")
        if resume:
            self._load_rng_state(resume)
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            own = None  # but virtual ranks have one process, and so one global generator
            if self.comm.Get_size() > 1:
                own = torch.Generator().manual_seed(10 * self.state.global_step + self.comm.Get_rank())
            drawn = torch.randn(6, 4, generator=own)
            self.optimizer.optimizer.zero_grad()
            self.model(drawn).square().mean().backward()
            self.optimizer.optimizer.step()
            self.state.global_step += 1
            self.tell("on_step_end")
            if self.state.global_step % self.log_every == 0:
                logs = {"loss": float(self.comm.Get_rank()), "name": "run"}
                self.state.log_history.append(dict(logs))
                self.tell("on_log", logs=logs)
            if self.state.global_step == 4 and out:
                self._save_optimizer_and_scheduler(out)
                self._save_rng_state(out)
                self.tell("on_save")
        self.tell("on_train_end")
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.fixture
def transformers(monkeypatch):
    stand_in(monkeypatch, "transformers", TrainerCallback=object)


def prepared(comm, **options):
    trainer = Trainer(comm, **options)
    prepare_trainer(trainer, comm)
    return trainer


@pytest.mark.usefixtures("transformers")
def test_logs_are_means_before_anything_sees_them_and_buffers_are_those_of_all_ranks():
    class Reporting:
        seen: ClassVar = []

        def on_log(self, args, state, control, logs, **_):
            self.seen.append((logs["loss"], logs["name"], state.log_history[-1]["loss"]))

    def program(comm):
        trainer = prepared(comm, callback=Reporting())
        trainer.train()
        return trainer.model[1].running_mean.tolist()

    means = results(2, program)
    assert set(Reporting.seen) == {(0.5, "run", 0.5)}
    assert means[0] == means[1]


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("late", [False, True])
def test_what_one_rank_decides_all_do(late):
    class Stopping:
        def __init__(self, rank):
            self.rank = rank

        def on_step_end(self, args, state, control, **_):
            if self.rank == 1 and state.global_step == 3:
                control.should_training_stop = control.should_evaluate = True

    def program(comm):
        trainer = prepared(comm, callback=None if late else Stopping(comm.Get_rank()), log_every=8)
        if late:
            trainer.add_callback(Stopping(comm.Get_rank()))
        trainer.train()
        return trainer.state.global_step, trainer.control.should_evaluate, trainer.control.should_save

    assert results(2, program) == [(3, True, False)] * 2


@pytest.mark.usefixtures("transformers")
def test_the_first_evaluation_has_the_predictions_of_all_ranks():
    def program(comm):
        return prepared(comm).gather_function(torch.tensor([comm.Get_rank()])).tolist()

    assert results(2, program) == [[0, 1]] * 2


@pytest.mark.usefixtures("transformers")
def test_the_best_checkpoint_is_that_of_rank_0(tmp_path):
    """A rank that looks before rank 0 has written it sees none, and kept other parameters."""
    def program(comm):
        trainer = prepared(comm)
        trainer.state.best_model_checkpoint = "checkpoint-4" if comm.Get_rank() == 0 else None
        trainer.train(str(tmp_path))
        return trainer.state.best_model_checkpoint

    assert results(2, program) == ["checkpoint-4"] * 2


@pytest.mark.usefixtures("transformers")
def test_other_numbers_of_batches_are_one_line_before_the_first_step():
    for error in run(2, lambda comm: prepared(comm, batches=4 + comm.Get_rank()).train()):
        assert isinstance(error, DisagreementError)
        assert "batches of an epoch: 4 on rank 0; 5 on rank 1" in str(error)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("n", [1, 2])
def test_a_trainer_goes_on_from_a_checkpoint_with_what_each_rank_has(tmp_path, n):
    def begun(comm):
        trainer = prepared(comm)
        return trainer.train(str(tmp_path)), trainer.files

    def resumed(comm):
        return prepared(comm).train(resume=str(tmp_path))

    whole = results(n, begun)
    assert [files for _, files in whole] == [["optimizer", "random"]] + [["optimizer"]] * (n - 1)
    for (values, _), again in zip(whole, results(n, resumed), strict=True):
        assert all(torch.equal(*pair) for pair in zip(values, again, strict=True))


class ParallelStrategy:
    """What Lightning's does, as far as the one of MPI's ranks leaves it to it."""

    def __init__(self, parallel_devices, cluster_environment):
        self.parallel_devices, self.cluster_environment = parallel_devices, cluster_environment
        self.optimizers, self.files = [], {}

    world_size = property(lambda self: self.cluster_environment.world_size())
    global_rank = property(lambda self: self.cluster_environment.global_rank())

    def setup(self, trainer):
        self.model, self.optimizers = trainer.model, trainer.optimizers
        self.lightning_module = self.model

    def lightning_module_state_dict(self):
        return self.lightning_module.state_dict()

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        self.files[filepath] = checkpoint

    def load_checkpoint(self, checkpoint_path, weights_only=None):
        return self.files.get(checkpoint_path)

    def remove_checkpoint(self, filepath):
        self.files.pop(filepath)


@pytest.fixture
def strategy(monkeypatch):
    """Return the class, over stand-ins for those of Lightning."""
    stand_in(monkeypatch, "lightning.pytorch.plugins.environments", ClusterEnvironment=object)
    stand_in(monkeypatch, "lightning.pytorch.callbacks", Callback=object)
    stand_in(monkeypatch, "lightning.pytorch.strategies", ParallelStrategy=ParallelStrategy)
    stand_in(monkeypatch, "lightning.pytorch.utilities", rank_zero_only=SimpleNamespace())
    for name in processes.HIDDEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(processes, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "mpi_ef.integrations.lightning", raising=False)
    yield __import__("mpi_ef.integrations", fromlist=["MpiStrategy"]).MpiStrategy
    sys.modules.pop("mpi_ef.integrations.lightning")


def test_lightning_sees_the_ranks(strategy):
    def program(comm):
        of_ranks, r = strategy(comm), comm.Get_rank()
        of_ranks.barrier("here")
        environment = of_ranks.cluster_environment
        environment.set_world_size(7)
        environment.set_global_rank(7)
        assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (2, r, r)
        assert environment.node_rank() == 0
        assert not environment.detect()
        assert of_ranks.distributed_sampler_kwargs == {"num_replicas": 2, "rank": r}
        assert of_ranks.root_device.type == "cpu"
        of_ranks.model_to_device()
        return (of_ranks.broadcast([r, "x"], 1), float(of_ranks.reduce(torch.tensor(float(r)))),
                float(of_ranks.reduce(r, reduce_op="ReduceOp.SUM")),
                float(of_ranks.reduce(torch.tensor(r), reduce_op="avg")),
                of_ranks.all_gather(torch.tensor([r])).tolist(), float(of_ranks.reduce(r, reduce_op=None)))

    assert results(2, program) == [([1, "x"], 0.5, 1.0, 0.5, [[0], [1]], 0.5)] * 2


def test_lightning_goes_on_and_stops_with_what_each_rank_has(strategy, tmp_path):
    path = str(tmp_path / "last.ckpt")

    def program(comm):
        model, optimizer = training(comm)
        of_ranks = strategy(comm)
        trainer = SimpleNamespace(model=model, optimizers=[Wrapping(optimizer)], callbacks=[], should_stop=False)
        of_ranks.setup(trainer)
        of_ranks.setup(trainer)  # as before a test of the same model
        (callback,) = trainer.callbacks
        trainer.should_stop = comm.Get_rank() == 1
        callback.on_train_batch_end(trainer, None, None, 0)
        assert trainer.should_stop is True
        take_steps(model, optimizer, comm, 3)
        of_ranks.save_checkpoint({"optimizer_states": []}, path)
        of_ranks.save_checkpoint({}, str(tmp_path / "weights.ckpt"))
        went_on = take_steps(model, optimizer, comm, 3)
        of_ranks.on_validation_start()
        statistics = of_ranks.lightning_module_state_dict()["1.running_mean"].tolist()
        of_ranks.load_optimizer_state_dict(of_ranks.load_checkpoint(path))
        same = all(torch.equal(*pair) for pair in zip(went_on, take_steps(model, optimizer, comm, 3), strict=True))
        comm.Barrier()
        of_ranks.remove_checkpoint(path)
        comm.Barrier()
        return same, statistics, sorted(file.name for file in tmp_path.iterdir())

    first, second = results(2, program)
    assert first[0]
    assert first == second
    assert first[2] == []


def test_lightning_tells_ranks_that_begin_with_the_same_batch(strategy):
    def program(comm, batches):
        of_ranks, model = strategy(comm), torch.nn.Linear(2, 1)
        trainer = SimpleNamespace(model=model, optimizers=[], callbacks=[], should_stop=False)
        of_ranks.setup(trainer)
        for step in range(2):
            trainer.callbacks[0].on_train_batch_start(trainer, model, batches[comm.Get_rank()], step)
            trainer.callbacks[0].on_train_batch_end(trainer, model, None, step)

    def told(first, second):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results(2, lambda comm: program(comm, (first, second)))
        return [str(warning.message).partition(";")[0] for warning in caught]

    ones = {"x": [torch.ones(2)], "name": "a"}
    assert told(ones, ones) == ["MpiStrategy: all 2 ranks began with the same batch, and so do the work of one"]
    assert told(ones, {"x": [torch.zeros(2)], "name": "a"}) == []
    assert told("no tensor", "no tensor") == []


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_lightning_tells_what_is_monitored_and_differs_between_ranks(strategy, apart):
    """Else each rank would stop and keep by numbers of its own."""
    def program(comm):
        trainer = SimpleNamespace(model=torch.nn.Linear(2, 1), optimizers=[], should_stop=False,
                                  callbacks=[SimpleNamespace(monitor="val_loss"), SimpleNamespace(monitor=None)],
                                  callback_metrics={"val_loss": torch.tensor(0.25 + apart * comm.Get_rank())})
        strategy(comm).setup(trainer)
        trainer.callbacks[-1].on_validation_end(trainer)
        trainer.callbacks[-1].on_validation_end(trainer)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results(2, program)
    line = ("MpiStrategy: val_loss, which a callback monitors, is 0.25 on rank 0 and another on others; "
            "log it with sync_dist=True")
    assert [str(warning.message) for warning in caught] == ([line] if apart else [])


def test_torchmetrics_in_lightning_compute_over_the_ranks(strategy, monkeypatch):
    class Metric(torch.nn.Module):
        dist_sync_fn = None

    stand_in(monkeypatch, "torchmetrics", Metric=Metric)

    def program(comm):
        model, own = torch.nn.ModuleList([Metric(), Metric()]), object()
        model[1].dist_sync_fn = own
        of_ranks = strategy(comm)
        of_ranks.setup(SimpleNamespace(model=model, optimizers=[], callbacks=[], should_stop=False))
        assert model[1].dist_sync_fn is own
        count = torch.arange(1.0 + comm.Get_rank())
        return model[0].distributed_available_fn(), [part.tolist() for part in model[0].dist_sync_fn(count, group=None)]

    assert results(2, program) == [(True, [[0], [0, 1]])] * 2
    assert results(1, program) == [(False, [[0]])]


def test_lightning_with_an_optimizer_that_exchanges_nothing_is_one_line(strategy):
    def program(comm):
        model = torch.nn.Linear(2, 1)
        strategy(comm).setup(SimpleNamespace(model=model, optimizers=[torch.optim.SGD(model.parameters())]))

    (error,) = run(1, program)
    assert str(error).startswith("MpiStrategy: its optimizer is SGD")


def test_the_package_has_no_other_names():
    import mpi_ef.integrations

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mpi_ef.integrations.nothing
