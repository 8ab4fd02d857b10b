"""All optimizers as the laws in test_optimizer_laws take them: how to build them, their phases, what they promise."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch

from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.compress import Identity, Quantize, Sign, TopK
from mpi_ef.optim import (
    EF21,
    ByzEF21,
    DistributedOptimizer,
    EControl,
    EF21Muon,
    Lion,
    LocalSteps,
    OneBitAdam,
    OneBitLamb,
    PowerSGD,
    Signum,
    ZeroOneAdam,
)
from mpi_ef.robust import Median

SIGNS = Sign(block=16)
# Updates of the variance in steps 1, 2, 3, 5, 7, 11, 15 ...; after 12 steps syncs in every one, then every 2nd, 4th.
SHORT = {"lr": 1e-2, "var_freeze_step": 12, "var_update_scaler": 2, "local_step_scaler": 6, "local_step_clipper": 4}
NEGATIVE = ({"dense_steps": -1}, "ErrorFeedback: dense_steps=-1 is negative; 0 starts compressed")


@dataclass(frozen=True, kw_only=True)
class Row:
    """An optimizer, and what of the laws holds for it."""

    make: Callable[..., Any]  # (params, comm, **options)
    options: dict = field(default_factory=dict)  # of short runs with phases
    moments: tuple[int, ...] = (3, 5)  # states are saved, and gradients break, after so many steps
    own: set  # arrays that differ between ranks in the end
    learns: tuple[int, slice, float]  # steps; first losses, of which the last must be less than this share
    learning: dict = field(default_factory=dict)  # options for it
    frozen: int | None = None  # when the variance is frozen in these runs
    freezes: dict | None = None  # options with which the variance freezes by itself
    clips: bool = True
    bad: tuple[tuple[dict, str], ...]  # options that are refused, and the words
    differing: tuple[str, Any, Any]  # an option and two values for two ranks
    wire: dict = field(default_factory=dict)  # options where bytes are counted
    calls: tuple[str, ...]  # collectives of a step
    saves: float  # dense bytes over bytes of a step
    dying: tuple[dict, ...] = ({},)  # options where units die
    rests: bool = True  # what has no gradient stays where it is
    lasting: dict = field(default_factory=dict)  # options of long runs in which errors stay bounded
    settles: int = 100  # steps after which they have about their final size

    @property
    def loses(self):
        """Whether compression leaves errors."""
        return "e_i" in self.own and self.saves > 1

    def __call__(self, net, comm, **options):
        return self.make(net.parameters(), comm, **self.options | options)


def dying(name, freezes, **options):
    """Return options for all that has to do with entries without variance."""
    return tuple(
        options | {"betas": (0.9, 0.99), name: freeze, "bias_correction": correct, "compressor": compressor}
        for freeze, correct, compressor in product(freezes, (True, False), (Sign(), Sign(block=64)))
    )


def adamw_updates(params, comm, **options):
    params = list(params)
    groups = params if isinstance(params[0], dict) else [{"params": params[:2], "lr": 1e-2},
                                                         {"params": params[2:], "weight_decay": 0.0}]
    return DistributedOptimizer(torch.optim.AdamW(groups, lr=2e-2), comm, TopK(0.1), dense_steps=2, **options)


def local_steps(params, comm, **options):
    options = {"every": 1} | options
    return LocalSteps(torch.optim.AdamW(params, lr=2e-2), comm, TopK(0.1), **options)


def sgd_gradients(params, comm, **options):
    sgd = torch.optim.SGD(params, lr=0.05, momentum=0.9)
    return DistributedOptimizer(sgd, comm, Identity(), **{"placement": "gradient"} | options)


def muon(params, comm, *, compressor=TopK(0.2), **options):  # noqa: B008
    return EF21Muon(params, comm, compressor, **options)


UNKNOWN_PLACE = ({"placement": "sideways"}, "DistributedOptimizer: placement='sideways' is unknown")
UNKNOWN_RULE = ({"rule": "ef22"}, "ErrorFeedback: there is no rule 'ef22'")
NO_BUCKET = ({"bucket_nbytes": 0}, "DistributedOptimizer: bucket_nbytes=0 is not a positive integer")
QUICKLY, SLOWLY = (60, slice(3), 0.8), (150, slice(3), 0.5)
GATHERS, TWO_PHASES = ("Allgather", "Allgather"), ("Allgather", "Allgather", "Alltoall")

_wrapper = {"clips": False, "learns": QUICKLY, "calls": GATHERS, "differing": ("dense_steps", 1, 0)}
_muon = {
    "make": muon, "clips": False, "learns": SLOWLY, "bad": (NEGATIVE, ({"beta": 1.5}, "eta=1.5 is not in [0, 1]")),
    "differing": ("dense_steps", 1, 0), "saves": 4,
}
_votes = {"learns": SLOWLY, "learning": {"lr": 5e-3}, "options": {"lr": 1e-2}, "own": {"m_i"}, "calls": TWO_PHASES,
          "saves": 31}
_adam = {
    "make": OneBitAdam, "options": {"lr": 1e-2, "freeze_step": 9, "compressor": SIGNS}, "moments": (3, 9, 10, 14, 16),
    "own": {"e_i", "plan.residual"}, "learns": (120, slice(18, 22), 0.5), "frozen": 20,
    "freezes": {"lr": 1e-3, "betas": (0.9, 0.9)}, "wire": {"compressor": Sign(block=1024)}, "calls": TWO_PHASES,
    "saves": 28, "dying": dying("freeze_step", [50], lr=3e-3), "lasting": {"freeze_step": 20},
    "bad": (
        ({"betas": (1.0, 0.9)}, "OneBitAdam: betas=(1.0, 0.9) are not in [0, 1)"),
        ({"freeze_step": 0}, "freeze_step=0 is not a positive integer; the variance"),
        ({"variance_floor": 2.0}, "variance_floor=2.0 is not in [0, 1]"), ({"clip": -1.0}, "clip=-1.0 is negative"),
    ),
    "differing": ("eps", 1e-8, 1e-7),
}
_lamb = _adam | {
    "make": OneBitLamb, "learns": (150, slice(18, 22), 0.5), "learning": {"lr": 2e-2},
    "dying": dying("freeze_step", [50], lr=1e-2),
    "bad": (
        ({"betas": (0.9, 1.0)}, "OneBitLamb: betas=(0.9, 1.0) are not in [0, 1)"),
        ({"freeze_step": 0}, "freeze_step=0 is not a positive integer; the variance"),
        ({"min_coeff": 11.0}, "min_coeff=11.0 is not in (0, 10.0]"),
        ({"factor_min": 1.5}, "factor_min=1.5 is not in (0, 1]"),
        ({"coeff_beta": 1.0}, "coeff_beta=1.0 is not in [0, 1)"),
        ({"factor_threshold": -0.1}, "factor_threshold=-0.1 is not in [0, 1)"),
        ({"variance_floor": 1.1}, "variance_floor=1.1 is not in [0, 1]"), ({"clip": -1.0}, "clip=-1.0 is negative"),
    ),
    "differing": ("coeff_beta", 0.0, 0.5),
}
_zero_one = _adam | {
    "make": ZeroOneAdam, "options": SHORT | {"compressor": SIGNS}, "own": {"e_i", "plan.residual", "m", "u"},
    # With an exact step next, with a compressed one, at the freeze, at and between synchronisations.
    "moments": (1, 3, 4, 6, 9, 12, 13, 14, 19, 20, 24, 25, 26, 28),
    "learns": (120, slice(10, 20), 0.5), "frozen": 12, "freezes": {"lr": 1e-3, "betas": (0.9, 0.9), "var_update_scaler": 4},
    "dying": (*dying("var_freeze_step", [50, 400], lr=3e-3, local_step_scaler=100, var_update_scaler=16),
              {"compressor": Sign()}), "lasting": {"local_step_scaler": 40},
    "bad": (
        ({"betas": (0.9, 1.0)}, "ZeroOneAdam: betas=(0.9, 1.0) are not in [0, 1)"),
        ({"var_freeze_step": 0}, "var_freeze_step=0 is not a positive integer; the variance"),
        ({"var_update_scaler": 0}, "var_update_scaler=0 is not a positive integer"),
        ({"local_step_scaler": 1.5}, "local_step_scaler=1.5 is not a positive integer"),
        ({"local_step_clipper": -1}, "local_step_clipper=-1 is not a positive integer"),
        ({"variance_floor": -0.1}, "variance_floor=-0.1 is not in [0, 1]"), ({"clip": -1.0}, "clip=-1.0 is negative"),
    ),
    "differing": ("local_step_clipper", 4, 5),
}
_topk = {"wire": {}, "saves": 8, "calls": GATHERS, "dying": (), "bad": ()}  # the rest is as with signs


def with_topk(row):
    return row | _topk | {"options": row["options"] | {"compressor": TopK(0.1)}}


ROWS = {
    name: Row(**row)
    for name, row in {
        "EF21": _wrapper | {
            "make": lambda params, comm, **options: EF21(params, comm, TopK(0.2), lr=0.05, **options),
            "own": {"g_i"}, "saves": 4, "bad": (NEGATIVE,),
        },
        "ByzEF21": _wrapper | {
            "make": lambda params, comm, **options: ByzEF21(params, comm, TopK(0.2), lr=0.05, aggregator=Median(),
                                                            **{"f": 0} | options),
            "own": set(), "saves": 3, "calls": ("Allgather", "Allgather", "Allgatherv"),
            "bad": (NEGATIVE, ({"f": -1}, "f=-1 is negative")),
        },
        "EControl": _wrapper | {
            "make": lambda params, comm, **options: EControl(params, comm, TopK(0.2), lr=0.05, momentum=0.5, **options),
            "own": {"e_i", "h_i"}, "saves": 4, "settles": 300, "bad": (NEGATIVE, ({"eta": 2.0}, "eta=2.0 is not in [0, 1]")),
        },
        "PowerSGD": _wrapper | {
            "make": lambda params, comm, **options: PowerSGD(params, comm, lr=0.02, momentum=0.5, **options),
            "options": {"rank": 1}, "own": {"e_i"}, "wire": {"rank": 4}, "saves": 9, "calls": GATHERS + ("Alltoallv",) * 4,
            "bad": (NEGATIVE, ({"rank": 0}, "LowRank: rank=0 is not a positive integer")),
        },
        "AdamW updates": _wrapper | {
            "make": adamw_updates, "moments": (1, 2, 3, 5), "own": {"e_i"}, "saves": 8,
            "bad": (UNKNOWN_PLACE, UNKNOWN_RULE, NO_BUCKET), "differing": ("bucket_nbytes", None, 100),
        },
        "Adam updates by signs": _wrapper | {
            "make": lambda params, comm, **options: DistributedOptimizer(torch.optim.Adam(params, lr=1e-2), comm, Sign(),
                                                                         **options),
            "own": {"e_i", "plan.residual"}, "saves": 30, "calls": TWO_PHASES, "rests": False, "settles": 300,
            "bad": (NEGATIVE, UNKNOWN_PLACE, UNKNOWN_RULE, NO_BUCKET),
        },
        "LocalSteps": _wrapper | {
            "make": local_steps, "own": {"e_i", "y"}, "saves": 8, "differing": ("every", 1, 2),
            "bad": (({"every": 0}, "LocalSteps: every=0 is not a positive integer"),
                    ({"decay": 1.5}, "LocalSteps: decay=1.5 is not in [0, 1]"),
                    ({"outer_lr": 0.0}, "LocalSteps: outer_lr=0.0 is not in (0, inf)"),
                    ({"outer_momentum": 1.0}, "LocalSteps: outer_momentum=1.0 is not in [0, 1)"),
                    ({"outer_momentum": 0.9}, "decay=0.95 with outer_momentum=0.9, which counts old messages again"),
                    ({"fragments": 0}, "LocalSteps: fragments=0 is not a positive integer"),
                    ({"fragments": 100}, "LocalSteps: fragments=100 of 7 parameters; a fragment has at least one")),
        },
        "SGD gradients": _wrapper | {
            "make": sgd_gradients, "own": {"e_i"}, "saves": 0.99, "calls": (*GATHERS, "Allgather", "Alltoallv", "Alltoallv"),
            "bad": (NEGATIVE, UNKNOWN_PLACE, UNKNOWN_RULE, NO_BUCKET),
        },
        "EF21Muon": _muon | {
            "own": {"g_i", "v_i"}, "calls": GATHERS, "learning": {"compressor": TopK(0.2, values=Quantize("bf16"))},
        },
        "EF21Muon in two phases": _muon | {
            "own": {"g_i", "v_i", "plan.residual"}, "calls": TWO_PHASES, "saves": 2,
            "options": {"plan": TwoPhaseMean},
            "learning": {"compressor": TopK(0.2, values=Quantize("bf16"))},
        },
        "Lion": _votes | {
            "make": Lion, "differing": ("betas", (0.9, 0.99), (0.8, 0.99)),
            "bad": (({"betas": (0.9, 1.0)}, "Lion: betas=(0.9, 1.0) are not in [0, 1)"),
                    ({"clip": -1.0}, "Lion: clip=-1.0 is negative")),
        },
        "Signum": _votes | {
            "make": Signum, "differing": ("clip", 0.0, 1.0),
            "bad": (({"momentum": 1.0}, "Signum: betas=(1.0, 1.0) are not in [0, 1)"),
                    ({"clip": -1.0}, "Signum: clip=-1.0 is negative")),
        },
        "OneBitAdam": _adam, "OneBitAdam TopK": with_topk(_adam),
        "OneBitLamb": _lamb, "OneBitLamb TopK": with_topk(_lamb),
        "ZeroOneAdam": _zero_one, "ZeroOneAdam TopK": with_topk(_zero_one),
    }.items()
}


def rows(which=lambda row: True):
    """Parametrise by all rows, or some of them."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items() if which(row)])


def cases(of, often=100):
    """Parametrise by all rows, and for each by what `of` makes of it; only the first few are in the gate."""
    listed = [pytest.param(row, case, id=f"{name}-{label(case)}", marks=[pytest.mark.exhaustive] * (n >= often))
              for name, row in ROWS.items() for n, case in enumerate(of(row))]
    return pytest.mark.parametrize(("row", "case"), listed)


def label(case):
    options = case[0] if isinstance(case, tuple) else case
    return ",".join(f"{name}={value}" for name, value in options.items()) if isinstance(options, dict) else str(options)
