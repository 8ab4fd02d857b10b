"""The experiments behind ``mpi-ef reproduce``."""

from pathlib import Path
from typing import Any

import numpy as np

from mpi_ef.collectives import chunk_bounds
from mpi_ef.collectives.agreement import agree
from mpi_ef.compress import Identity, TopK
from mpi_ef.errors import DataError
from mpi_ef.feedback.theory import step_size
from mpi_ef.jobs.libsvm import load_libsvm, split_rows
from mpi_ef.jobs.problems import LogisticRegression, Quadratics, smoothness, zeta_quadratics
from mpi_ef.jobs.report import pyplot
from mpi_ef.jobs.reproduce import Outcome, ReproduceConfig
from mpi_ef.jobs.simulate import Curve, descend

__all__ = ["econtrol", "ef21"]

LEAST = 1e-33  # what is drawn of ||grad f||^2; below it is rounding

Curves = dict[str, Curve]


def own_clients(comm: Any, n: int) -> range:
    """Return the clients that this rank carries."""
    bounds, rank = chunk_bounds(n, comm.Get_size()), comm.Get_rank()
    return range(bounds[rank], bounds[rank + 1])


def data_file(folder: Path, name: str) -> Path:
    """Return the LIBSVM file of that name.

    Raises
    ------
    DataError
        When there is none: which to get, and where it goes.
    """
    for ending in ("", ".libsvm", ".txt", ".xz", ".libsvm.xz", ".txt.xz"):
        if (path := folder / f"{name}{ending}").is_file():
            return path
    raise DataError(f"reproduce: {folder} has no file {name}; get it from "
                    "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html, put it there, or pass --data "
                    "with its folder")  # fmt: skip


def logistic_regression(comm: Any, folder: Path, name: str, n: int) -> LogisticRegression:
    """Return this rank's part of the regression on a LIBSVM file, dealt out to n clients in order. Collective."""
    found = []

    def facts() -> dict[str, object]:
        found.append(load_libsvm(data_file(folder, name)))
        return {f"the size of {name}": found[0][0].shape}

    agree(comm, "reproduce", facts, "give all ranks the same files")
    ((a, b),) = found
    parts = split_rows(b, n)
    return LogisticRegression([(a[parts[c]], b[parts[c]]) for c in own_clients(comm, n)])


# set: (k, multiple of the theory's step size) as tuned on the authors' poster, and steps for about as many bits as there.
POSTER = {
    "phishing": ({"ef21": (1, 16), "ef14": (1, 16), "ef21-plus": (1, 256), "gd": (68, 1)}, 650),
    "mushrooms": ({"ef21": (2, 1024), "ef14": (2, 64), "ef21-plus": (1, 4096), "gd": (112, 4)}, 3500),
    "a9a": ({"ef21": (4, 64), "ef14": (4, 64), "ef21-plus": (1, 2048), "gd": (123, 2)}, 1500),
    "w8a": ({"ef21": (1, 64), "ef14": (1, 32), "ef21-plus": (1, 2048), "gd": (300, 4)}, 1500),
}


def ef21(comm: Any, config: ReproduceConfig) -> Outcome:
    """Run EF21, EF14, EF21+ and gradient descent on four sets, 20 clients, with the tuned step sizes. Collective."""
    n, curves = 20, dict[str, Curves]()
    lines = ["set        rule          k  factor  steps   bits sent  as papers count  least ||grad f||^2       last"]
    for name, (runs, steps) in POSTER.items():
        problem = logistic_regression(comm, config.data, name, n)
        constants = smoothness(comm, problem, n)
        x0 = np.random.RandomState(0).normal(size=problem.d)
        curves[name] = {}
        for rule, (k, factor) in runs.items():
            compressor = Identity() if rule == "gd" else TopK(k=k)
            alpha = compressor.alpha(problem.d)
            gamma = factor * step_size("gd" if rule == "gd" else "ef21", constants, alpha)
            _, curve = descend(comm, problem, n, "ef21" if rule == "gd" else rule, compressor, gamma=gamma,
                               steps=config.steps or steps, x0=x0, dense_steps=int(rule != "ef14"), every=10,
                               tolerance=1e-30)  # fmt: skip
            curves[name][rule] = curve
            lines.append(f"{name:<10} {rule:<10} {k:4} {factor:7} {curve.steps[-1]:6} {curve.sent_bits[-1]:11.3g} "
                         f"{curve.paper_bits[-1]:16.3g} {min(curve.squared_norms):19.1e} "
                         f"{curve.squared_norms[-1]:10.1e}")  # fmt: skip
    rows = [
        row for name, runs in curves.items() for rule, curve in runs.items() for row in curve.rows(f"{name} {rule}")
    ]
    return Outcome(rows, "\n".join(lines), lambda path: draw_against_bits(curves, path))


def draw_against_bits(panels: dict[str, Curves], path: Path) -> None:
    """Draw ||grad f||^2, a panel for each problem: above against bits really sent, below against bits as papers count."""
    plt = pyplot("reproduce")
    figure, axes = plt.subplots(2, len(panels), figsize=(3.6 * len(panels), 6.4), squeeze=False, sharey="col",
                                layout="constrained")  # fmt: skip
    for column, (name, curves) in enumerate(panels.items()):
        for row, bits in enumerate(("sent_bits", "paper_bits")):
            panel = axes[row, column]
            for rule, curve in curves.items():
                panel.plot(getattr(curve, bits), curve.squared_norms, label=rule, linewidth=1.2)
            panel.set(yscale="log", xscale="log")
            panel.set_ylim(bottom=max(panel.get_ylim()[0], LEAST))
            panel.grid(visible=True, alpha=0.3)
            panel.set_xlabel(
                "bits sent per client, indices included" if row == 0 else "bits per client as papers count"
            )
        axes[0, column].set_title(name)
        axes[0, column].legend(fontsize=8)
    for panel in axes[:, 0]:
        panel.set_ylabel("||grad f(x)||^2")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def econtrol(comm: Any, config: ReproduceConfig) -> Outcome:
    """Run EControl, EC, EF21, EC-Ideal and naive compression on least squares whose clients disagree by zeta. Collective."""
    n, d, alpha = 10, 100, 0.1
    compressor, x0 = TopK(alpha), np.ones(d)
    curves, lines = dict[str, Curves](), [f"{'zeta':>5} {'method':<10} ||grad f||^2 at the end"]
    for zeta in (0.0, 1.0, 10.0, 100.0):
        problem = zeta_quadratics(own_clients(comm, n), n, d, zeta, seed=1)
        gamma = step_size("ef21", smoothness(comm, problem, n), alpha)
        panel = curves[f"zeta = {zeta:g}"] = {}
        for method, rule, options in (
            ("naive", "naive", {}), ("EC", "ef14", {}), ("EC-Ideal", "ef14", {}), ("EF21", "ef21", {}),
            ("EControl", "econtrol", {"eta": 0.3 * alpha}),
        ):  # fmt: skip
            seen = ideal(comm, problem) if method == "EC-Ideal" else problem
            _, panel[method] = descend(comm, seen, n, rule, compressor, gamma=gamma, steps=config.steps or 3000, x0=x0,
                                       dense_steps=int(rule in ("ef21", "econtrol")), every=20, options=options)  # fmt: skip
            lines.append(f"{zeta:5g} {method:<10} {panel[method].squared_norms[-1]:.1e}")
    rows = [
        row for name, runs in curves.items() for rule, curve in runs.items() for row in curve.rows(f"{name} {rule}")
    ]
    return Outcome(rows, "\n".join(lines), lambda path: draw_against_bits(curves, path))


def ideal(comm: Any, problem: Quadratics) -> Quadratics:
    """Return what EC-Ideal sees: gradients less those at the optimum, which in practice nobody knows. Collective."""
    gathered = comm.allgather((problem.scales, problem.shifts))
    scales, shifts = (np.concatenate([part[i] for part in gathered]) for i in range(2))
    optimum = shifts.mean(axis=0) / scales.mean()
    return Quadratics(problem.scales, problem.scales[:, None] * optimum)
