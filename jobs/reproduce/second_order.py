"""MKOR against what its users would otherwise pick: losses at equal steps, bytes, times, state."""


from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs import figures
from mpi_ef.jobs.reproduce.outcome import Outcome, ReproduceConfig

__all__ = ["mkor"]

Options = Mapping[str, Any]
Found = dict[str, dict[int, dict[str, Any]]]  # by run and seed

_DENSE: Options = {"compressor": "identity", "placement": "gradient"}
_GPT: Options = {"layers": 2, "width": 64, "batch": 8, "steps": 300}
_DIGITS: Options = {"model": "mlp", "batch": 32, "steps": 200, "warmup": 0, "clip": 1.0}
_SPARSE: Options = {"compressor": "topk", "ratio": 0.01, "values": "bf16", "beta1": 0.5, "lr": 0.01}
_ADAM: Options = {**_GPT, **_DENSE, "beta1": 0.9}
_SGD: Options = {"optimizer": "sgd", "weight_decay": 0.0, **_DENSE}
_WINDOW: Options = {"precondition": "window"}
_SENT: Options = {**_WINDOW, "statistics": "bf16"}
_SEEDS = (0, 1)
_TIMED = 33  # steps whose parts are timed
_LATE = 50  # steps at the end, of which the training loss is the mean


def _runs() -> dict[str, Options]:
    """Return the options of all runs by name: what is trained, with which optimizer, at which learning rate."""
    forms = ("window", "exact", "blended", "eva", "kfac")
    muon = {**_GPT, "optimizer": "ef21-muon", "ratio": 0.1, "dense_steps": 1, "clip": 0.0}
    ef21 = {**_DIGITS, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "placement": "gradient", "rule": "ef21",
            "compressor": "topk", "ratio": 0.05, "values": "full", "dense_steps": 1}
    digits = {**_DIGITS, **_DENSE, "beta1": 0.9}
    return {
        **{f"gpt adamw {lr}": {**_ADAM, "lr": lr} for lr in (0.003, 0.006, 0.01)},
        **{f"gpt adamw {form} 0.006": {**_ADAM, "precondition": form, "lr": 0.006} for form in forms},
        "gpt adamw window 0.01": {**_ADAM, **_WINDOW, "lr": 0.01},
        "gpt sgd 0.3": {**_GPT, **_SGD, "lr": 0.3},
        **{f"gpt sgd {form} 0.3": {**_GPT, **_SGD, "precondition": form, "lr": 0.3} for form in forms},
        **{f"gpt topk {steps}": {**_GPT, **_SPARSE, "steps": steps} for steps in (100, 300)},
        **{f"gpt topk window {steps}": {**_GPT, **_SPARSE, **_SENT, "steps": steps} for steps in (100, 300)},
        **{f"gpt ef21-muon {lr}": {**muon, "lr": lr} for lr in (0.02, 0.04, 0.08)},
        **{f"mlp adamw {lr}": {**digits, "lr": lr} for lr in (0.03, 0.06, 0.1)},
        **{f"mlp adamw window {lr}": {**digits, **_WINDOW, "lr": lr} for lr in (0.03, 0.06, 0.1)},
        **{f"mlp sgd {form} 0.3": {**_DIGITS, **_SGD, "precondition": form, "lr": 0.3}
           for form in ("none", "exact", "blended")},
        **{f"mlp ef21 {form} {lr}": {**ef21, "precondition": form, "lr": lr}
           for form in ("none", "exact") for lr in (0.1, 0.3)},
    }


def _large() -> dict[str, Options]:
    """Return those of the default GPT, which take most of the time."""
    return {f"default topk {form} {lr}": {**_SPARSE, "precondition": form, "lr": lr, "steps": 800,
                                          **({} if form == "none" else {"statistics": "bf16"})}
            for form in ("none", "window") for lr in (0.003, 0.006, 0.01)}


def mkor(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Train with and without, on all ranks, and say what was demanded and what was measured. Collective.

    The numbers of the acceptance table are of two ranks and two seeds.
    """
    steps: Options = {"steps": config.steps} if config.steps else {}
    found: Found = {}
    for name, options in (_runs() | _large()).items():
        found[name] = {seed: _train(comm, {**options, **steps, "seed": seed}, config.out) for seed in _SEEDS}
        if comm.Get_rank() == 0:
            print(f"{name:28}validation loss {_mean(found, name):.4f}", flush=True)
    table = [*_forms(found), "", *_acceptance(found, comm.Get_size()), *_alone(comm, config), *_times(), *_state_line()]
    rows = [{"panel": name.split()[0], "run": name, "seed": seed, **run} for name, seeds in found.items()
            for seed, run in seeds.items()]
    return Outcome(rows, "\n".join(table), lambda path: _draw(found, path))


def _train(comm: MpiComm, options: Options, out: Path) -> dict[str, Any]:
    """Run one training; return losses over steps and bytes, and what it took. Collective."""
    from mpi_ef.jobs.train.config import TrainConfig
    from mpi_ef.jobs.train.loop import Trainer

    given = {name: value for name, value in options.items() if (name, value) != ("precondition", "none")}
    trainer = Trainer(comm, TrainConfig(**given, out=out / "none"))
    steps, path = int(options["steps"]), list[tuple[int, float, int, int]]()
    late = max(0, steps - _LATE)
    for step in range(1, steps + 1):
        trainer.step()
        if step % 20 == 0 or step in (late, steps):
            row = trainer.row(evaluate=step == steps)
            path.append((step, row["loss"], row["sent_nbytes"], step - (path[-1][0] if path else 0)))
    after = [(loss, count) for step, loss, _, count in path if step > late]
    timed = max(1, steps - trainer.untimed_steps)
    return {"val_loss": row["val_loss"], "loss": sum(loss * count for loss, count in after) / sum(c for _, c in after),
            "sent_nbytes": row["sent_nbytes"], "dense_nbytes": row["dense_nbytes"],
            "statistics_nbytes": getattr(trainer.optimizer, "statistics_nbytes", 0),
            "seconds_per_step": row["seconds"] / timed, "parameters": trainer.optimizer.flat.d,
            "replicas_equal": len(set(trainer.fingerprints())) == 1,
            "factors_equal": _factors_equal(comm, trainer.optimizer), "path": [part[:3] for part in path]}


def _factors_equal(comm: MpiComm, optimizer: Any) -> bool:
    preconditioner = getattr(optimizer, "preconditioner", None)
    if preconditioner is None:
        return True
    mine = {name: array.tobytes() for name, array in preconditioner.replicated().items()}
    return all(theirs == mine for theirs in comm.allgather(mine))


def _mean(found: Found, name: str, what: str = "val_loss") -> float:
    values = [float(run[what]) for run in found[name].values()]
    return sum(values) / len(values)


def _best(found: Found, names: Iterable[str], what: str = "val_loss") -> float:
    return min(_mean(found, name, what) for name in names)


def _forms(found: Found) -> list[str]:
    """Return the comparison of forms, at equal steps and learning rate."""
    lines = ["GPT of 2 layers of width 64, 300 steps, dense; means of two seeds",
             f"{'':28}{'validation':>12}{'training':>10}{'kB of statistics':>18}{'ms a step':>11}"]
    shown = [name for name in found if name.startswith(("gpt adamw", "gpt sgd"))]
    return lines + [
        f"{name.removeprefix('gpt '):28}{_mean(found, name):12.4f}{_mean(found, name, 'loss'):10.4f}"
        f"{_mean(found, name, 'statistics_nbytes') / 1000:18.1f}{1000 * _mean(found, name, 'seconds_per_step'):11.1f}"
        for name in shown]


def _acceptance(found: Found, ranks: int) -> list[str]:
    """Return what was demanded, by the design of this optimizer before it was built, and what was measured."""
    adamw = [f"gpt adamw {lr}" for lr in (0.003, 0.006, 0.01)]
    muon = min((f"gpt ef21-muon {lr}" for lr in (0.02, 0.04, 0.08)), key=lambda name: _mean(found, name))
    digits, window = [f"mlp adamw {lr}" for lr in (0.03, 0.06, 0.1)], "gpt adamw window 0.006"
    default = {form: [f"default topk {form} {lr}" for lr in (0.003, 0.006, 0.01)] for form in ("none", "window")}

    def over(one: str, other: str, what: str = "val_loss") -> float:
        return _mean(found, one, what) / _mean(found, other, what)

    rows: list[tuple[str, str, Callable[[], float]]] = [
        ("AdamW 0.006, dense: validation loss with / without window", "<= 0.98",
         lambda: over("gpt adamw window 0.006", "gpt adamw 0.006")),
        ("AdamW 0.01 with window / the best AdamW of three rates", "<= 0.975",
         lambda: _mean(found, "gpt adamw window 0.01") / _best(found, adamw)),
        ("Top-1 % in bf16, 100 steps: with / without", "<= 0.97", lambda: over("gpt topk window 100", "gpt topk 100")),
        ("Top-1 % in bf16, 300 steps: with / without", "<= 0.98", lambda: over("gpt topk window 300", "gpt topk 300")),
        (f"the same with / {muon.removeprefix('gpt ')}, 10 %", "<= 0.98", lambda: over("gpt topk window 300", muon)),
        ("bytes of these", "<= 0.15", lambda: over("gpt topk window 300", muon, "sent_nbytes")),
        ("SGD momentum 0.3, dense: with / without window", "<= 0.98", lambda: over("gpt sgd window 0.3", "gpt sgd 0.3")),
        ("digits, AdamW 0.03 with window / the best of three rates: training loss", "<= 0.5",
         lambda: _mean(found, "mlp adamw window 0.03", "loss") / _best(found, digits, "loss")),
        ("the same, the best of three rates with / without", "", lambda: _best(
            found, [f"mlp adamw window {lr}" for lr in (0.03, 0.06, 0.1)], "loss") / _best(found, digits, "loss")),
        ("digits, SGD momentum 0.3: exact / without", "<= 0.5",
         lambda: over("mlp sgd exact 0.3", "mlp sgd none 0.3", "loss")),
        ("digits, SGD momentum 0.3: blended / without", "<= 0.5",
         lambda: over("mlp sgd blended 0.3", "mlp sgd none 0.3", "loss")),
        ("digits, EF21 Top-5 %, SGD 0.1: exact / without", "< 1",
         lambda: over("mlp ef21 exact 0.1", "mlp ef21 none 0.1", "loss")),
        ("digits, EF21 Top-5 %, SGD 0.3: exact / without", "< 1",
         lambda: over("mlp ef21 exact 0.3", "mlp ef21 none 0.3", "loss")),
        ("exact over AdamW 0.006: validation loss with / without", "",
         lambda: over("gpt adamw exact 0.006", "gpt adamw 0.006")),
        ("bytes of statistics / of dense gradients", "<= 0.002",
         lambda: _mean(found, window, "statistics_nbytes") / _mean(found, window, "dense_nbytes")),
        ("bytes, Top-1 %, statistics in bf16: with / without", "<= 1.13",
         lambda: over("gpt topk window 300", "gpt topk 300", "sent_nbytes")),
        ("runs with replicas and factors equal bit for bit", "== 1", lambda: sum(
            run["replicas_equal"] and run["factors_equal"] for seeds in found.values() for run in seeds.values())
            / sum(map(len, found.values()))),
        ("default GPT, 800 steps, Top-1 %, best of three rates: with / without", "<= 1",
         lambda: _best(found, default["window"]) / _best(found, default["none"])),
    ]
    lines = [f"{ranks} ranks, means of two seeds{'':43}{'demanded':>12}{'measured':>10}"]
    for text, wanted, figure in rows:
        try:
            value = figure()
        except ZeroDivisionError:  # one rank sends nothing
            lines.append(f"{text:72}{wanted:>12}{'-':>10}")
            continue
        lines.append(f"{text:72}{wanted:>12}{value:10.4f}  {_verdict(wanted, value)}")
    return lines


def _verdict(wanted: str, value: float) -> str:
    if not wanted:
        return ""
    sign, limit = wanted.split()
    holds = {"<=": value <= float(limit), "<": value < float(limit), "==": value == float(limit)}[sign]
    return "reached" if holds else "MISSED"


def _times() -> list[str]:
    """Return what the parts of a step take of this process, default GPT, 16 x 64 characters. Local."""
    import torch

    from mpi_ef import MKOR, Identity
    from mpi_ef.jobs.train.models import GPT
    from mpi_ef.optim.muon import LinearMinimization
    from mpi_ef.testing.virtual import results

    def backward(model: Any, tokens: Any) -> None:
        logits = model(tokens)
        loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()

    def program(comm: Any) -> dict[str, float]:
        torch.manual_seed(0)
        model = GPT(100, context=64, layers=4, heads=4, width=128)
        tokens = torch.randint(0, 100, (16, 64))
        inner = torch.optim.AdamW(model.parameters(), lr=1e-4)
        optimizer = MKOR(inner, comm, Identity(), model=model, placement="gradient")
        descent = LinearMinimization(model.parameters(), lr=1e-6, weight_decay=0.0, vector_radius=0.1)
        spent: dict[str, list[float]] = {name: [] for name in ("seen", "unseen", "learn", "multiply", "adamw", "muon")}

        def clock(name: str, action: Callable[[], object]) -> None:
            began = process_time()
            action()
            spent[name].append(process_time() - began)

        def learn() -> None:
            watcher.close()
            watcher.exchange()

        watcher = optimizer.preconditioner
        for step in range(_TIMED):
            model.zero_grad()
            watcher.forget()
            watcher.steps = 10 + step % 2  # due every other time
            clock("unseen" if step % 2 else "seen", lambda: backward(model, tokens))
            if step % 2 == 0:
                clock("learn", learn)
            clock("multiply", watcher.precondition)
            clock("adamw", inner.step)
            clock("muon", descent.step)
        return {name: median(values[2:]) for name, values in spent.items()}

    found = results(1, program, virtual=True)[0]
    extra = max(0.0, found["seen"] - found["unseen"]) / 10 + found["learn"] / 10 + found["multiply"]
    ratio, other = extra / found["unseen"], (extra + found["adamw"]) / found["muon"]
    listed = ", ".join(f"{name} {1000 * value:.2f}" for name, value in found.items())
    rows = (("default GPT, 16 x 64 characters: preconditioner / forward and backward", "<= 0.1", ratio),
            ("preconditioner and AdamW / descent of EF21-Muon", "<= 0.7", other))
    return [*(f"{text:72}{wanted:>12}{value:10.4f}  {_verdict(wanted, value)}" for text, wanted, value in rows),
            f"  ms of this process: {listed}"]


def _alone(comm: MpiComm, config: ReproduceConfig) -> list[str]:
    """Return how far a dense training on all ranks ends from one of this process with all their batches. Collective."""
    from mpi_ef.jobs.train.config import TrainConfig, learning_rate
    from mpi_ef.jobs.train.loop import Trainer
    from mpi_ef.testing.virtual import results

    steps_of: Options = {"steps": config.steps} if config.steps else {}
    options: Options = {**_runs()["mlp sgd exact 0.3"], **steps_of, "clip": 0.0, "seed": 0}
    asked, n, steps = TrainConfig(**options, out=config.out / "none"), comm.Get_size(), int(options["steps"])

    def batches(rank: Any) -> list[tuple[Any, Any]]:
        trainer = Trainer(rank, asked)
        return [trainer.next_batch() for _ in range(steps)]

    def program(one: Any) -> float:
        trainer = Trainer(one, asked)
        for step in range(steps):
            for group in trainer.optimizer.param_groups:
                group["lr"] = learning_rate(asked, step + 1)
            trainer.optimizer.zero_grad()
            for inputs, targets in [seen[step] for seen in of_ranks]:
                trainer.backward(inputs, targets, 1 / n)
            trainer.optimizer.step()
        trainer.steps = steps
        return float(trainer.row(evaluate=True)["val_loss"])

    together = float(_train(comm, options, config.out)["val_loss"])
    of_ranks = results(n, batches, virtual=True)
    away = abs(together - results(1, program, virtual=True)[0])
    text = f"{'digits, exact, dense: validation loss of all ranks - of one process':72}{'<= 5e-5':>12}{away:10.1e}"
    return [f"{text}  {_verdict('<= 5e-5', away)}"]


def _state_line() -> list[str]:
    """Return numbers kept per parameter of the layers, default GPT. Local."""
    from mpi_ef import Preconditioner
    from mpi_ef.jobs.train.models import GPT
    from mpi_ef.testing.virtual import results

    def program(comm: Any) -> float:
        watcher = Preconditioner(GPT(100, context=64, layers=4, heads=4, width=128), comm)
        kept = sum(array.size for array in watcher.replicated().values())
        return float(kept) / sum(row.shape[0] * row.shape[1] for row in watcher.layers if row.part == "both")

    value = results(1, program, virtual=True)[0]
    return [f"{'window, width 128: numbers kept / parameters of the layers':72}{'0.17':>12}{value:10.4f}"]


def _draw(found: Found, path: Path) -> None:
    """Draw training losses against steps and bytes."""
    shown = {"AdamW 0.006": "gpt adamw 0.006", "window over AdamW 0.01": "gpt adamw window 0.01",
             "K-FAC over AdamW": "gpt adamw kfac 0.006", "Top-1 %": "gpt topk 300",
             "window, Top-1 %": "gpt topk window 300", "EF21-Muon 0.02, 10 %": "gpt ef21-muon 0.02"}
    figure, axes = figures.pyplot().subplots(1, 2, figsize=(9.6, 3.8), layout="constrained", sharey=True)
    for label, name in shown.items():
        steps, losses, nbytes = zip(*next(iter(found[name].values()))["path"], strict=True)
        axes[0].plot(steps, losses, label=label, linewidth=1.2)
        axes[1].plot([n / 1e6 for n in nbytes], losses, label=label, linewidth=1.2)
    axes[0].set_xlabel("steps")
    axes[0].set_ylabel("training loss")
    axes[1].set_xlabel("MB sent by a rank")
    if all(n > 0 for name in shown.values() for *_, n in next(iter(found[name].values()))["path"]):
        axes[1].set_xscale("log")
    axes[0].legend(fontsize=8)
    figures.save(figure, path)
