"""Compressors, rules and optimizers by name, and texts that say which and how: nothing that they say is evaluated."""

import gc
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import virtual
from my_compressor import BlockMax
from my_optimizer import Normalized
from my_plan import TrimmedMean
from my_rule import FADING
from programs import loss_of, model, same_bits, trained
from vectors_for_tests import gaussian

from mpi_ef import errors, registry
from mpi_ef.collectives import DenseMean, GatherMean, TwoPhaseMean, plan_for
from mpi_ef.compress import Identity, LowRank, Quantize, RandK, Sign, TopK, Vote
from mpi_ef.errors import ConfigError, OptionError, PeerError, nearest
from mpi_ef.feedback import RULES, ErrorFeedback
from mpi_ef.jobs.options import parse, to_toml
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.optimizers import build_compressor
from mpi_ef.optim import EF21, DistributedOptimizer, OneBitAdam, OneBitLamb, Signum

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COMPRESSORS = [
    Identity(), Quantize("bf16"), Quantize("int8", block=64), Sign(), Sign(block=8), Vote(), TopK(0.1), TopK(k=7),
    TopK(0.3, values=Quantize("bf16"), segments=(3, 4)), TopK(0.2, segments="parameters"), RandK(0.1, seed=7), RandK(k=3),
    LowRank(2, shapes=((3, 4), (5,))), LowRank(1, shapes="parameters", seed=3),
]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_what_compressors_print_can_be_read(compressor):
    assert registry.built("compressor", str(compressor)) == compressor


def test_specifications_are_as_in_python():
    read = {
        "TopK(0.01, values=Quantize('bf16'))": TopK(0.01, values=Quantize("bf16")),
        " RandK( k=3 , seed = 2 )\n": RandK(k=3, seed=2),
        "Vote": Vote(),
        "Sign()": Sign(),
        "my_compressor:BlockMax(8)": BlockMax(8),
    }
    assert {text: registry.built("compressor", text) for text in read} == read
    rule = registry.specified("rule", "ef21-sgdm(eta=-0.5)")
    assert (rule.name, rule.thing, rule.arguments, rule.options) == ("ef21-sgdm", RULES["ef21-sgdm"], (), {"eta": -0.5})
    assert registry.specified("optimizer", "OneBitAdam(freeze_step=130)").thing is OneBitAdam
    for sign in ".", ":", " : ":
        what = registry.specified("plan", f"TwoPhaseMean(reply=my_compressor{sign}BlockMax(8))")
        assert what.options == {"reply": BlockMax(8)}


def test_a_colon_names_what_a_module_has_at_any_depth():
    """Outside of quotes, where a text keeps it."""
    text = ("my_optimizer:Normalized(compressor=my_compressor:BlockMax(8), beta='a:b', "
            "x=(\"it's x:y\", 'z\\':w', '''q's e:f''', ''))")
    what = registry.specified("optimizer", text)
    assert what.options == {"compressor": BlockMax(8), "beta": "a:b", "x": ("it's x:y", "z':w", "q's e:f", "")}
    assert registry.specified("rule", "ef21-bc(reply=my_compressor:BlockMax(8))").options == {"reply": BlockMax(8)}
    assert registry.specified("plan", "TwoPhaseMean(reply=TopK(0.1, values=mpi_ef.compress:Sign()))").options == {
        "reply": TopK(0.1, values=Sign())}


@pytest.mark.parametrize(("kind", "text", "words"), [
    ("compressor", "topk(0.1)", "there is no compressor 'topk'; did you mean TopK?"),
    ("compressor", "Nothing(0.1)", "take one of Identity, LowRank, Quantize, RandK, Sign, TopK, TwoBits, "
     "Vote, or module:name"),
    ("compressor", "TopK(ration=0.1)", "TopK has no option ration; did you mean ratio?"),
    ("compressor", "TopK(0.1, ratio=0.2)", "multiple values for argument 'ratio'"),
    ("compressor", "Vote(3)", "too many positional arguments"),
    ("compressor", "TopK(2.0)", "ratio=2.0"),
    ("compressor", "TopK(0.1, values=__import__('os').getcwd())", "is no value: take numbers"),
    ("compressor", "TopK(0.1, values=open('x'))", "there is no compressor 'open'"),
    ("compressor", "TopK([x for x in (1,)][0])", "is no value"),
    ("compressor", "TopK(1 + 1)", "is no value"),
    ("compressor", "TopK(*(0.1,))", "mean nothing here"),
    ("compressor", "TopK(**{'ratio': 0.1})", "mean nothing here"),
    ("compressor", "TopK(0.1", "is no compressor"),
    ("compressor", "TopK(0.1)(2)", "write for example TopK"),
    ("compressor", "", "write a name, with arguments where it takes some"),
    ("compressor", "no_module:Thing", "cannot be loaded: No module named 'no_module'"),
    ("compressor", "my_compressor:Thing", "cannot be loaded: .* has no attribute 'Thing'"),
    ("rule", "ef22", "there is no rule 'ef22'; did you mean ef2"),
    ("plan", "Gather", "there is no plan 'Gather'; did you mean GatherMean?"),
    ("optimizer", "OnebitAdam", "did you mean OneBitAdam?"),
    ("optimizer", "ReplicatedOptimizer", "there is no optimizer 'ReplicatedOptimizer'"),
    ("model", "mlp", "there is no model 'mlp'; write module:name"),
    ("compressor", "TopK(0.1, values=my_compressor.Nothing())", "cannot be loaded: .* has no attribute 'Nothing'"),
    ("compressor", "TopK(0.1, values=my_compressor:Nothing())", "cannot be loaded: .* has no attribute 'Nothing'"),
    ("compressor", "TopK({'ratio': 0.1})", "is no value"),
    ("compressor", "TopK((0.1, 0.2))", r"TopK: ratio=\(0.1, 0.2\) is not in"),
    ("compressor", "TopK('0.1')", "TopK: ratio='0.1' is not in"),
    ("compressor", f"TopK(1{'0' * 400})", "0 ... is not in"),
    ("compressor", "TopK(0.1, values=3)", r"TopK: values=3 is no compressor; pass for example Quantize\('bf16'\)"),
    ("compressor", "RandK(0.1, values='bf16')", "RandK: values='bf16' is no compressor"),
    ("compressor", "TopK(0.1, segments=-5)", "TopK: segments=-5 is not a positive integer; 4096 is usual"),
    ("compressor", "TopK(0.1, segments=('3',))", "TopK: segments=.*; pass the lengths of the parts"),
    ("compressor", "TopK(0.1, segments=(3, -1))", "TopK: segments=.*; pass the lengths of the parts"),
    ("compressor", "Quantize(['bf16'])", "format=.* is unknown; take one of bf16"),
    ("compressor", "LowRank(2, shapes=5)", "LowRank: shapes=5; pass the shapes"),
    ("compressor", "Sign('8')", "Sign: block='8' is not a positive integer"),
])
def test_what_is_wrong_is_said_in_one_line(kind, text, words):
    with pytest.raises(OptionError, match=words) as told:
        registry.built(kind, text) if kind == "compressor" else registry.specified(kind, text)
    assert "\n" not in str(told.value)


def test_the_beginning_of_a_name_leads_to_it():
    options = ["--link", "--ranks-per-node", "--ratio"]
    assert nearest("--ranks", options) == "did you mean --ranks-per-node?"
    assert nearest("--raito", options) == "did you mean --ratio?"
    assert nearest("--", options, "none") == "none"


def test_names_are_all_there_is():
    assert registry.names("rule") == sorted(RULES)
    assert {*registry.names("plan")} == {"GatherMean", "TwoPhaseMean", "DenseMean", "LowRankMean", "ClientsMean", "NodeMean",
                                         "RobustMean"}
    assert {"EF21", "OneBitAdam", "Lion", "DistributedOptimizer"} <= {*registry.names("optimizer")}


class _Yielding:
    """Garbage in a circle; collecting it lets other threads run."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        time.sleep(0)


def test_threads_may_read_specifications_at_the_same_time():
    """CPython 3.11 raises SystemError where a thread begins a syntax tree while another one makes one."""
    text, threshold = "TopK(0.01, values=Quantize('bf16'))", gc.get_threshold()

    def read(_):
        _Yielding()
        return registry.built("compressor", text)

    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(read, range(200))) == {TopK(0.01, values=Quantize("bf16"))}
    finally:
        gc.set_threshold(*threshold)


def test_signatures_list_the_options():
    """Of classes that are built on all ranks together; a default is no attribute of an object that has another value."""
    adam, lamb = inspect.signature(OneBitAdam), inspect.signature(OneBitLamb)
    assert [p.name for p in adam.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == ["params", "comm"]
    assert {p.name: p.default for p in lamb.parameters.values() if p.name not in adam.parameters} == {
        "max_coeff": 10.0, "min_coeff": 0.01, "coeff_beta": 0.9, "factor_max": 4.0, "factor_min": 0.5,
        "factor_threshold": 0.1,
    }
    assert (adam.parameters["lr"].default, adam.parameters["lr"].annotation) == (1e-3, float)
    assert not hasattr(OneBitAdam, "lr")
    for name in registry.names("optimizer"):
        taken = inspect.signature(registry.found("optimizer", name)).parameters
        assert "comm" in taken, name


def test_installed_packages_bring_their_own(monkeypatch):
    """By entry points; what is built in comes first."""

    def points(*, group, name=None):
        mine = [importlib.metadata.EntryPoint("BlockMax", "my_compressor:BlockMax", "mpi_ef.compressors"),
                importlib.metadata.EntryPoint("TopK", "my_compressor:BlockMax", "mpi_ef.compressors"),
                importlib.metadata.EntryPoint("fading", "my_rule:FADING", "mpi_ef.rules"),
                importlib.metadata.EntryPoint("trimmed", "my_plan:TrimmedMean", "mpi_ef.plans"),
                importlib.metadata.EntryPoint("normalized", "my_optimizer:Normalized", "mpi_ef.optimizers"),
                importlib.metadata.EntryPoint("gone", "no_module:thing", "mpi_ef.rules")]
        return [point for point in mine if point.group == group and name in (None, point.name)]

    monkeypatch.setattr(registry, "entry_points", points)
    assert registry.built("compressor", "BlockMax(4)") == BlockMax(4)
    assert registry.built("compressor", "TopK(0.5)") == TopK(0.5)
    assert registry.specified("rule", "fading(fade=0.1)").thing is FADING
    assert registry.specified("optimizer", "normalized(beta=0.1)").thing is Normalized
    assert {type(plan) for plan, *_ in (row[0] for row in plans("trimmed(trim=1)"))} == {TrimmedMean}
    assert "fading" in registry.names("rule")
    with pytest.raises(OptionError, match="rule 'gone' cannot be loaded: No module named 'no_module'"):
        registry.found("rule", "gone")


@pytest.mark.parametrize(("rule", "options", "same"), [
    ("econtrol(eta=0.2)", {}, ("econtrol", {"eta": 0.2})),
    ("econtrol(eta=0.2)", {"eta": 0.4}, ("econtrol", {"eta": 0.4})),
    (RULES["ef21"], {}, ("ef21", {})),
    (FADING, {"fade": 0.5}, ("my_rule:FADING(fade=0.5)", {})),
    ("my_rule:FADING(fade=0.0)", {}, ("my_rule:FADING", {"fade": 0.0})),
])
def test_a_rule_is_an_object_a_name_or_a_specification(rule, options, same):
    def program(comm):
        rules = [ErrorFeedback(r, GatherMean(comm, TopK(0.1), 50), **o) for r, o in ((rule, options), same)]
        for step in range(4):
            x = gaussian(comm.Get_rank(), 50, step=step)
            assert same_bits(*(feedback.step(x) for feedback in rules))
        assert same_bits(*(feedback.per_rank() for feedback in rules))

    virtual.results(2, program)


@pytest.mark.parametrize(("rule", "words"), [
    ("ef22", "ErrorFeedback: there is no rule 'ef22'"),
    ("econtrol(0.2)", "its arguments want names, such as econtrol"),
    ("econtrol(strength=0.2)", "econtrol has no option strength; it has: eta"),
    ("econtrol(eta=2.0)", r"eta=2.0 is not in \[0, 1\]"),
    ("my_compressor:BlockMax", "my_compressor:BlockMax is no Rule"),
    (TopK(0.1), "is neither a name nor a Rule"),
])
def test_a_wrong_rule_on_one_rank_stops_all(rule, words):
    def program(comm):
        wrong = comm.Get_rank() == 1
        with pytest.raises(OptionError if wrong else PeerError, match=words):
            ErrorFeedback(rule if wrong else "ef21", GatherMean(comm, TopK(0.1), 50))

    virtual.results(2, program)


def test_a_compressor_says_which_plan_suits_it():
    def program(comm):
        assert type(plan_for(comm, BlockMax(4), 30)) is GatherMean
        assert type(plan_for(comm, Sign(), 30)) is TwoPhaseMean

    virtual.results(2, program)


def plans(plan, **options):
    """Return the plans through which a few steps go, and the parameters after them, with a plan as an option says it."""

    def program(comm):
        net = model()
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        optimizer = DistributedOptimizer(sgd, comm, TopK(0.2), placement="gradient", plan=plan, **options)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            optimizer.step()
        return optimizer.plans(), [p.detach().numpy() for p in net.parameters()]

    return virtual.results(3, program)


@pytest.mark.parametrize(("text", "builder", "kind"), [
    ("my_plan:TrimmedMean(trim=1)", partial(TrimmedMean, trim=1), TrimmedMean),
    ("my_plan:TrimmedMean", TrimmedMean, TrimmedMean),
    ("TwoPhaseMean(reply=TopK(0.5))", partial(TwoPhaseMean, reply=TopK(0.5)), TwoPhaseMean),
    ("DenseMean", lambda comm, _, d, dtype: DenseMean(comm, d, dtype), DenseMean),
])
def test_a_plan_is_what_builds_it_or_a_specification(text, builder, kind):
    """With buckets too, which overlap."""
    for options in ({}, {"overlap": True, "bucket_nbytes": 100}):
        for (mine, values), (others, expected) in zip(plans(text, **options), plans(builder, **options), strict=True):
            assert {type(plan) for plan in [*mine, *others]} == {kind}
            assert same_bits(values, expected)
            assert all(plan.trim == 1 for plan in mine if kind is TrimmedMean)


@pytest.mark.parametrize(("plan", "words"), [
    ("TrimedMean", "there is no plan 'TrimedMean'"),
    ("my_plan:TrimmedMean(trimm=1)", "has no option trimm; did you mean trim?"),
    ("my_plan:TrimmedMean(d=1)", "has no option d; it has: trim"),
    ("my_plan:TrimmedMean(trim=2)", "trim=2 is not a non-negative integer up to 1; there are 3 ranks"),
    ("my_compressor:BlockMax", "my_compressor:BlockMax: too many positional arguments"),
    ("my_rule:FADING", "my_rule:FADING is a Rule, which cannot be built"),
    (lambda *_: 3, "has built a int, which is no Plan"),
    (3, "plan=3 builds no plan; pass a class such as TwoPhaseMean"),
    (TopK, "plan=.*TopK.* builds no plan; pass a class such as TwoPhaseMean"),
    (DenseMean, "plan=.*DenseMean.*: too many positional arguments"),
    ("TwoPhaseMean(reply=3)", "TwoPhaseMean: reply=3 is no compressor; pass for example TopK"),
    ("TwoPhaseMean(combine='median')", "TwoPhaseMean: combine='median' is no Combine; pass an object"),
    ("GatherMean(combine=3)", "GatherMean: combine=3 is no Combine; pass an object"),
    ("ClientsMean", "'ClientsMean': ClientsMean: missing a required argument: 'clients'"),
    ("Auto", "there is no plan 'Auto'; did you mean auto?"),
    ("ClientsMean(clients='3')", "ClientsMean: clients='3' on 3 ranks"),
    ("ClientsMean(clients=3, weights=('a', 1, 1))", "ClientsMean: weights=.*; pass one finite number a client"),
])
def test_a_wrong_plan_on_one_rank_stops_all(plan, words):
    def program(comm):
        wrong = comm.Get_rank() == 1
        for build in (lambda plan: OneBitAdam(model().parameters(), comm, plan=plan),
                      lambda plan: EF21(model().parameters(), comm, TopK(0.1), lr=0.1, plan=plan)):
            with pytest.raises(OptionError if wrong else PeerError, match=words):
                build(plan if wrong else partial(TrimmedMean, trim=1))

    virtual.results(3, program)


class _Odd(BlockMax):
    plan = "gathr"


@pytest.mark.parametrize(("build", "wrong", "right", "words"), [
    (lambda comm, c: EF21(model().parameters(), comm, c, lr=0.1), TopK, TopK(0.1), "=<class .*TopK'> is no compressor"),
    (lambda comm, c: OneBitAdam(model().parameters(), comm, compressor=c), "Sign()", Sign(),
     "='Sign.*' is no compressor"),
    (lambda comm, b: OneBitAdam(model().parameters(), comm, betas=b), 0.9, (0.9, 0.9), r"=0.9 are not 2 numbers in \[0,"),
    (lambda comm, lr: OneBitAdam(model().parameters(), comm, lr=lr), "0.1", 0.1, "lr='0.1' is a text; pass a number"),
    (lambda comm, o: DistributedOptimizer(o or sgd(), comm, TopK(0.1)), torch.optim.SGD, None,
     "SGD'> is no torch optim"),
    (lambda comm, o: wrapped(comm, **o), {"dense_step": 1}, {}, "no option dense_step; did you mean dense_steps?"),
    (lambda comm, o: wrapped(comm, **o), {"momentun": 0.1}, {"momentum": 0.1}, "momentun; did you mean momentum?"),
    (lambda comm, o: wrapped(comm, rule="econtrol", **o), {"etta": 0.1}, {"eta": 0.1}, "no option etta; did you mean eta?"),
    (lambda comm, r: ErrorFeedback(r, GatherMean(comm, TopK(0.1), 20)), "ef14(dense_steps=1)", "ef14",
     "no option dense_steps; it has: decay"),
    (lambda comm, r: ErrorFeedback("ef21-bc", GatherMean(comm, TopK(0.1), 20), reply=r), Sign, Sign(),
     "Sign'> is not a compressor"),
    (lambda comm, c: plan_for(comm, c, 10), _Odd(3), BlockMax(3), "kind 'gathr', which there is not; did you mean gather?"),
])
def test_a_wrong_kind_of_option_on_one_rank_or_all_stops_all(build, wrong, right, words):
    def program(comm, wrong_ranks):
        with pytest.raises(OptionError if comm.Get_rank() in wrong_ranks else PeerError, match=words):
            build(comm, wrong if comm.Get_rank() in wrong_ranks else right)

    for wrong_ranks in (1,), (0, 1):
        virtual.results(2, partial(program, wrong_ranks=wrong_ranks))


def sgd():
    return torch.optim.SGD(model().parameters(), lr=0.05)


def wrapped(comm, **options):
    return DistributedOptimizer(sgd(), comm, TopK(0.1), **options)


@pytest.mark.parametrize(("build", "words"), [
    (lambda _: ErrorFeedback("ef14", GatherMean), "ErrorFeedback: plan=<class .*GatherMean'> is no plan; pass for example"),
    (lambda comm: ErrorFeedback("ef14", GatherMean(comm, TopK(0.1), 9), dense_step=1), "did you mean dense_steps?"),
    (lambda _: OneBitAdam(model().parameters(), TopK(0.1)), "comm=TopK.* is not an intracommunicator; pass for example"),
])
def test_what_has_the_place_of_something_else_is_named(build, words):
    def program(comm):
        with pytest.raises(OptionError, match=words):
            build(comm)

    virtual.results(2, program)


@dataclass(frozen=True, repr=False)
class _Breaks(BlockMax):
    def codec(self, d, dtype=np.float32):
        codec = super().codec(d, dtype)
        codec.pack = _broken
        return codec


def _broken(x, wire, *, step, rank):
    np.stack([x, x[: x.size - 1 - rank]])  # which raises inside of numpy, where that has lines


@pytest.mark.parametrize("plan", [GatherMean, TwoPhaseMean])
def test_an_error_in_a_users_codec_says_where(plan):
    line = _broken.__code__.co_firstlineno + 1
    words = rf"{plan.__name__}.exchange: ValueError: all input arrays .* \(test_registry.py, line {line}\)$"

    def program(comm):
        built = plan(comm, _Breaks(3), 30)
        with pytest.raises(OptionError, match=words) as told:
            built.exchange(gaussian(comm.Get_rank(), 30))
        assert type(told.value.__cause__) is ValueError

    virtual.results(2, program)


def test_an_error_of_no_user_has_no_place():
    def told(action):
        try:
            action()
        except ValueError as error:
            return errors.told(error)

    assert told(partial(np.stack, [])).startswith("ValueError: need at least one array to stack (test_registry.py, line ")
    assert errors.told(ValueError("of nobody")) == "ValueError: of nobody"


def test_a_strangers_rule_and_compressor_train_save_and_resume():
    """In any optimizer, in parts while autograd works, and to the last bit."""

    def build(net, comm):
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        return DistributedOptimizer(sgd, comm, BlockMax(3), placement="gradient", rule="my_rule:FADING(fade=0.5)",
                                    overlap=True, bucket_nbytes=100)

    def train(net, optimizer, rank, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(net, rank, step).backward()
            optimizer.step()

    def program(comm):
        rank, nets = comm.Get_rank(), [model(), model()]
        first = build(nets[0], comm)
        before = loss_of(nets[0], rank, 99).item()
        train(nets[0], first, rank, range(20))
        assert loss_of(nets[0], rank, 99).item() < before
        second = build(nets[1], comm)
        nets[1].load_state_dict(nets[0].state_dict())
        second.load_state_dict(first.state_dict())
        for net, optimizer in zip(nets, (first, second), strict=True):
            train(net, optimizer, rank, range(20, 25))
        assert same_bits(*([p.detach().numpy() for p in net.parameters()] for net in nets))

    virtual.results(2, program)


def test_training_options_may_be_specifications(tmp_path, capsys):
    assert build_compressor(TrainConfig(compressor="TopK(k=9, values=Sign())")) == TopK(k=9, values=Sign())
    assert build_compressor(TrainConfig(compressor="my_compressor:BlockMax(7)", rule="ef21")) == BlockMax(7)
    assert TrainConfig(rule="econtrol(eta=0.1)", placement="gradient").rule == "econtrol(eta=0.1)"
    flags = ["--compressor", "TopK(0.1, values=Sign())", "--rule", "econtrol(eta=0.1)"]
    given = parse(TrainConfig, flags, prog="train", description="")
    assert (given.compressor, given.rule) == ("TopK(0.1, values=Sign())", "econtrol(eta=0.1)")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(given), encoding="utf-8")
    again = parse(TrainConfig, ["--config", str(file)], prog="train", description="")
    assert again.resolved() == given.resolved()
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--compressor", "TopK(ration=0.1)"], prog="train", description="")
    assert "TopK has no option ration; did you mean ratio?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], prog="train", description="")
    assert "identity} | NAME(OPTION=...)" in " ".join(capsys.readouterr().out.split())
    for options, words in [
        ({"compressor": "Topk(0.1)"}, "there is no compressor 'Topk'; did you mean TopK?"),
        ({"compressor": "TopK(0.1)", "ratio": 0.2}, "ratio=0.2 has no effect with compressor=TopK"),
        ({"rule": "econtrol(eta=0.1)", "eta": 0.2}, "eta=0.2 has no effect with rule=econtrol"),
        ({"rule": "ef21-page", "placement": "update"}, "sends changes of gradients"),
        ({"rule": "ef21-page()", "placement": "update"}, "sends changes of gradients"),
        ({"rule": "ef23"}, "there is no rule 'ef23'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            TrainConfig(**options)


def test_mpi_ef_train_takes_specifications(tmp_path):
    """As docs/algorithms.md shows; and what a specification says is what the options say. Both are recorded."""
    small = {"model": "mlp", "steps": 4, "batch": 8, "warmup": 1, "eval_every": 4}
    runs = {
        "mine": {"rule": "my_rule:FADING(fade=0.5)", "compressor": "my_compressor:BlockMax(64)"},
        "text": {"rule": "econtrol(eta=0.1)", "compressor": "TopK(0.05, values=Quantize('bf16'))"},
        "options": {"rule": "econtrol", "eta": 0.1, "compressor": "topk", "ratio": 0.05, "values": "bf16"},
    }
    ended = {
        name: trained(2, TrainConfig(**small, **options, out=tmp_path / name))[0] for name, options in runs.items()
    }
    assert ended["mine"]["replicas_equal"]
    assert ended["mine"]["config"]["rule"] == "my_rule:FADING(fade=0.5)"
    assert 'rule = "econtrol(eta=0.1)"' in (tmp_path / "text" / "config.toml").read_text(encoding="utf-8")
    assert ended["text"]["val_loss"] == ended["options"]["val_loss"]
    assert ended["text"]["sent_nbytes"] == ended["options"]["sent_nbytes"]


@pytest.mark.slow
def test_examples_run_alone(tmp_path):
    """Each is short, and imports nothing of the inside of the package; one process runs them one after the other."""
    most = {"my_compressor": 60, "my_rule": 60, "my_plan": 60, "my_optimizer": 60, "my_model": 40}
    for name, lines in most.items():
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) < lines, name
        assert not re.search(r"import _|\._(?!zeros|slices|bind|like)[a-z]", text), name
    program = ("import runpy, sys\nfor name in sys.argv[1:]:\n"
               "    runpy.run_module(name, run_name='__main__', alter_sys=True)\n    print()")
    done = subprocess.run([sys.executable, "-c", program, *most], capture_output=True, text=True, timeout=200, check=False,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}"})
    assert (done.returncode, done.stderr) == (0, "")
    *alone, model_ = done.stdout.split("\n\n", 4)
    for text in alone:
        assert np.isfinite(float(text.split()[-1].strip("[]")))
    assert "validation loss" in model_
    assert (tmp_path / "runs" / "train" / "summary.json").is_file()


def test_the_repr_of_an_optimizer_says_what_travels_and_how():
    def program(comm):
        net = model()
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        wrapped_sgd = DistributedOptimizer(sgd, comm, TopK(0.2), placement="gradient", rule="ef21-sgdm", eta=0.25,
                                           bucket_nbytes=1)
        first, *others = repr(wrapped_sgd).splitlines()
        assert first == ("ef21-sgdm(eta=0.25) with TopK(ratio=0.2, values=Identity()) through GatherMean on 2 ranks, "
                         f"{len(wrapped_sgd.channels())} buckets")
        assert others[0] == "DistributedOptimizer ("
        assert "    lr: 0.05" in others
        assert repr(Signum(net.parameters(), comm)).startswith(
            "lion(beta1=0.9, beta2=0.9) with Vote() through TwoPhaseMean on 2 ranks\nSignum (\n")
        assert repr(ErrorFeedback("ef21", GatherMean(comm, TopK(k=3), 50))) == (
            "ef21 with TopK(k=3, values=Identity()) through GatherMean on 2 ranks")
        half = object.__new__(Signum)  # in a message about what could not be built
        half.param_groups = []
        assert repr(half) == "Signum ()"

    virtual.results(2, program)


def test_the_documentation_of_error_feedback_names_all_rules():
    words = ErrorFeedback.__doc__.rpartition("Rules: ")[2].replace(".", "").replace("\n", " ").split(", ")
    assert [word.strip() for word in words] == list(RULES)


def test_what_exchanges_already_is_not_wrapped_twice():
    """On one rank: all raise."""

    def program(comm):
        net, wrong = model(), comm.Get_rank() == 1
        once = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), comm, TopK(0.2))
        for inner in (once, Signum(net.parameters(), comm)):
            with pytest.raises(OptionError if wrong else PeerError, match=f"optimizer is {type(inner).__name__}, which"):
                DistributedOptimizer(inner if wrong else torch.optim.SGD(net.parameters(), lr=0.05), comm, TopK(0.2))

    virtual.results(2, program)


@pytest.mark.parametrize(("kind", "first", "second", "same"), [
    ("compressor", "TopK(0.01, values=Quantize('bf16'))", "TopK(values=Quantize(format='bf16'), ratio=0.01)", True),
    ("compressor", "Sign()", "Sign", True), ("compressor", "TopK(0.01)", "TopK(0.02)", False),
    ("compressor", "TopK(0.01)", "RandK(0.01)", False), ("compressor", "TopK(0.01)", "TopK(0.01, more=3)", False),
    ("rule", "econtrol(eta=0.1)", "econtrol( eta = 0.1 )", True), ("rule", "econtrol(eta=0.1)", "econtrol(eta=0.2)", False),
    ("optimizer", "OneBitAdam(freeze_step=13, eps=1e-8)", "OneBitAdam(eps=1e-8, freeze_step=13)", True),
    ("optimizer", "OneBitAdam(freeze_step=13)", "OneBitAdam(freeze_step=14)", False),
    ("plan", "GatherMean", "GatherMean()", True), ("plan", "GatherMean", "TwoPhaseMean", False),
    ("model", "gpt", "mlp", False),
])
def test_texts_that_specify_the_same(kind, first, second, same):
    """The order of options, spaces and defaults make no other object."""
    assert registry.same(kind, first, second) is registry.same(kind, second, first) is same
    assert registry.same(kind, first, first)
