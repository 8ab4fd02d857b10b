"""The options of a training run, and what it writes."""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpi_ef.jobs.options import Checked, option
from mpi_ef.jobs.train import choices as choices_of
from mpi_ef.jobs.train import settings

__all__ = ["FILES", "PHASES", "PROOF", "TrainConfig", "learning_rate"]

PROOF = "summary.json"  # what only a finished run has; all files are in FILES


# Parts of a step: load a batch; forward and backward; compress; wait for messages; apply messages; all else of the
# optimizer's step.
PHASES = ("data", "compute", "encode", "communicate", "decode", "update")


def _for(name: str, help: str, allowed: str | int | None = None, *, choices: Sequence[str] = (), others: str = "") -> Any:
    """Return an option that goes with some choices only, as the table in choices.py says."""
    return option(None, help, allowed, choices=choices, others=others, shown=choices_of.described(name))


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Options of a training run; every field is a flag and a key of the TOML file.

    What goes with some choices only is None until it is given, or :meth:`resolved`.
    """

    model: str = option("gpt", "gpt on text; mlp or cnn on scikit-learn's digits; a function that returns a model and data",
                        choices=tuple(choices_of.MODELS), others="MODULE:FUNCTION(OPTION=...)")
    text: Path | None = _for("text", "UTF-8 text")
    data: str | None = option(None, "what text or digits have to be, by their content, as config.toml says",
                              shown="not compared")
    split: str | None = _for("split", "how the digits are dealt to the ranks", choices=("shuffled", "by-label"))
    steps: int = option(800, "optimizer steps", 1)
    batch: int = option(16, "samples per rank and step", 1)
    context: int | None = _for("context", "characters per sample", 1)
    layers: int | None = _for("layers", "blocks", 1)
    heads: int | None = _for("heads", "attention heads", 1)
    width: int | None = _for("width", "width", 1)
    optimizer: str = option("adamw", "adamw, sgd: torch's on every rank, with a rule under it",
                            choices=tuple(choices_of.OPTIMIZERS), others="NAME(OPTION=...)")
    lr: float = option(0.006, "peak learning rate; linear warm-up, then cosine to a tenth of it", "[0, inf)")
    warmup: int = option(40, "steps of linear warm-up", 0)
    momentum: float | None = _for("momentum", "momentum", "[0, 1)")
    beta1: float | None = _for("beta1", "weight of the past in the momentum, of Adam's kind", "[0, 1)")
    beta2: float | None = _for("beta2", "weight of the past in the variance, of Adam's kind; in the momentum of lion",
                               "[0, 1)")
    weight_decay: float | None = option(None, "of the optimizer", "[0, inf)", shown=choices_of.DECAY.text)
    code: str | None = _for("code", "gradients of which those of the slowest S ranks are not waited for; rank 0 has the "
                            "parameters, see docs/stragglers.md", choices=("none",),
                            others="fr:S, cyclic:S, blocks:S, gc:S, srsgc:B,W,LAM, msgc:B,W,LAM, auto")
    sweep: str | None = _for("sweep", "trainings at once, each with another value of an option, as lr=0.1,0.03,0.01")
    profile: Path | None = _for("profile", "lateness.npz of a run, from which code=auto takes the fastest scheme")
    dedicated: bool | None = _for("dedicated", "let rank 0 compute no gradients")
    compress_orders: bool | None = _for("compress_orders", "compress what rank 0 sends as well, as answers are")
    patience_seconds: float | None = _for("patience_seconds", "how long a step waits for the ranks that it needs",
                                          "(0, inf)")
    on_silence: str | None = _for("on_silence", "what is done then: save and end, wait on, or take what is there",
                                  choices=("raise", "wait", "approximate"))
    twins: str | None = _for("twins", "what is done where answers to be of the same bits differ: end, or say so",
                             choices=("raise", "warn"))
    precondition: str | None = _for("precondition", "what gradients are multiplied by, learned from vectors that ranks "
                                    "exchange; see docs/algorithms.md", choices=tuple(choices_of.PRECONDITIONS))
    sides: str | None = _for("sides", "of layers, which learn", choices=("both", "inputs", "outputs"))
    precondition_every: int | None = _for("precondition_every", "steps between two exchanges of these vectors", 1)
    statistics: str | None = _for("statistics", "how these vectors travel", choices=("full", "bf16"))
    fallback: float | None = _for("fallback", "go on without when progress is less than this share of the best; 0 never",
                                  "[0, 1)")
    placement: str | None = _for("placement", "what is exchanged: the optimizer's update, or the gradient",
                                 choices=tuple(choices_of.PLACEMENTS))
    rule: str | None = _for("rule", "error-feedback rule, see docs/algorithms.md", choices=tuple(choices_of.RULES),
                            others="NAME(OPTION=...)")
    eta: float | None = _for(
        "eta", "strength of the feedback of econtrol, weight of the new gradient or momentum of ef21-*", "[0, 1]"
    )
    beta: float | None = _for("beta", "weight of the past in the rule's momentum", "[0, 1)")
    vote_beta1: float | None = _for("vote_beta1", "weight of the rule's momentum in the vote", "[0, 1)")
    vote_beta2: float | None = _for("vote_beta2", "weight of the past in the rule's momentum", "[0, 1)")
    participation: float | None = _for("participation", "share of the ranks that send in a step", "(0, 1]")
    smoothness: str | None = _for("smoothness",
                                  "smoothness L_i of the loss on each rank, such as 1,2.5,1,4: its weight")
    reply: float | None = _for("reply", "share of the entries of what comes back to the ranks; 1 for all", "(0, 1]")
    whole: float | None = _for("whole", "probability of a step with the gradient of all samples of each rank", "(0, 1]")
    zeta: float | None = _for("zeta", "a rank is silent while its estimate is so much worse than the gradient before",
                              "[0, inf)")
    correction: float | None = _for("correction", "share of the entries, drawn at random, of the second message", "(0, 1]")
    byzantine: int | None = _for("byzantine", "how many ranks may be wrong", 0)
    aggregator: str | None = _for("aggregator", "what takes the place of the mean over ranks, see docs/robust.md",
                                  others="NAME(OPTION=...)")
    compressor: str | None = _for("compressor", "identity exchanges everything", choices=tuple(choices_of.COMPRESSORS),
                                  others="NAME(OPTION=...)")
    plan: str | None = _for("plan", "how the ranks' messages are exchanged and combined", others="NAME(OPTION=...)")
    ratio: float | None = _for("ratio", "share of entries that are kept", "(0, 1]")
    block: int | None = _for("block", "entries that share a scale", 1)
    rank: int | None = _for("rank", "columns of a factor", 1)
    freeze: int | None = _for("freeze", "steps of dense warm-up; 0 waits until the variance has settled", 0)
    exchange_every: int | None = _for("exchange_every", "steps of every rank by itself before what they have led to is "
                                      "exchanged", 1)
    decay: float | None = _for("decay", "what of an error counts an exchange later", "[0, 1]")
    outer_lr: float | None = _for("outer_lr", "learning rate of the step along what was exchanged", "(0, inf)")
    outer_momentum: float | None = _for("outer_momentum", "Nesterov's momentum of that step; wants decay=1", "[0, 1)")
    fragments: int | None = _for("fragments", "runs of parameters that are exchanged at different steps", 1)
    late: bool | None = _for("late", "let messages travel while the next steps are taken, and apply them then")
    local_steps: int | None = _for("local_steps", "steps after which the time between two exchanges doubles", 1)
    overlap: bool | None = _for("overlap", "let buckets travel during the backward pass; no clipping")
    per_parameter: bool | None = _for("per_parameter", "keep the share of every parameter, not of the whole model")
    values: str | None = _for("values", "how kept or quantized values travel; full with topk and randk",
                              choices=choices_of.VALUES)
    dense_steps: int | None = _for("dense_steps", "first steps that exchange everything", 0)
    clip: float = option(1.0, "largest norm of a rank's own gradient, before compression; 0 for no limit", "[0, inf)")
    device: str | None = option(
        None, "auto is the GPU for this rank, shared where there are fewer, and the CPU without any; cuda the same, but no "
        "CPU; cuda:0 that one on every rank", shown="auto", choices=("auto", "cpu", "cuda"), others="cuda:NUMBER")
    gpu_aware_mpi: bool = option(False, "give MPI memory of GPUs, after data have shown that it can; no twins on the host")
    seed: int = option(0, "of model, shards, order and random compressors", 0)
    log_every: int = option(10, "steps between rows of metrics", 1)
    eval_every: int = option(100, "steps between validations", 1)
    checkpoint_every: int = option(0, "steps between two checkpoints in the folder checkpoints of --out; 0 writes none", 0)
    save_in_background: bool | None = _for("save_in_background", "copy what is saved, and write it meanwhile")
    stop_after: int | None = _for(
        "stop_after", "save and stop after so many steps of this launch, as a signal would; 0 goes on to the end", 0
    )
    keep: int | None = _for("keep", "how many of the last checkpoints stay", 1)
    resume: str = option(
        "no", "go on from the newest checkpoint in --out, if there is one; the last two also with another number of ranks",
        choices=("no", "exact", "redistribute", "reset"), recorded=False)
    on_failure: str | None = _for(
        "on_failure", "shrink goes on from the newest checkpoint with the ranks that are left when one dies; Open MPI with "
        "ULFM", choices=("stop", "shrink"))
    out: Path = option(Path("runs/train"), "folder for metrics.jsonl, metrics.csv, summary.json and config.toml")
    tensorboard: bool | None = option(
        None, "write the metrics for TensorBoard as well, into tensorboard of --out; wants the package tensorboard",
        shown="no")
    overwrite: bool = option(False, "remove what an earlier run has left in --out, its checkpoints too", recorded=False)

    def __post_init__(self) -> None:
        """Refuse what has no effect, and what would fail later, before MPI is started."""
        for name in settings.SPECIFIED:
            known = self.__dataclass_fields__[name].metadata["choices"]
            if (value := getattr(self, name)) is not None and value not in known:
                settings.check_specified(name, value, known)
        super().__post_init__()
        settings.check(self.chosen())
        if self.sweep is not None:
            settings.swept(self)

    @classmethod
    def of_file(cls, values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """Return what counts of a file: what has an effect, of a config.toml with all options, as runs once wrote it."""
        if not choices_of.full_record(values):
            return values
        every: dict[str, Any] = {f.name: f.default for f in fields(cls) if f.default is not None}
        used = choices_of.earlier(every | values | flags)
        return {name: used[name] for name in values if name in used}

    def chosen(self) -> dict[str, Any]:
        """Return all options that apply; None where the default follows from what is built."""
        return choices_of.resolve({name: value for name, value in asdict(self).items() if value is not None})

    def resolved(self) -> "TrainConfig":
        """Return the same with every option that applies, and None for all others."""
        return replace(self, **self.chosen())


# Options of every run of every version: one that is added later is not among them.
_IN_EVERY_RECORD = {"model", "steps", "batch", "optimizer", "clip", "seed", "log_every", "eval_every", "checkpoint_every",
                    "out"}


def _is_record(text: str) -> bool:
    """Return whether this can be a config.toml of a run, of any version: it has these options, and no comments."""
    try:
        names = tomllib.loads(text).keys()
    except (ValueError, RecursionError):
        return False
    return names >= _IN_EVERY_RECORD and not any(line.startswith("#") for line in text.splitlines())


# What a run writes besides checkpoints, and what tells it from other files of the same names.
FILES: Mapping[str, Callable[[str], bool]] = {
    PROOF: lambda text: text.startswith("{"),
    "metrics.jsonl": lambda text: text.startswith('{"step": '),
    "metrics.csv": lambda text: text.startswith("step,"),
    "config.toml": _is_record,
    "lateness.npz": lambda text: text.startswith("PK"),
    "requeue": lambda _: True,
}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of step 1, 2, ...: linear warm-up to `lr`, cosine to a tenth of it at the end."""
    if config.warmup and step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))
