"""The experiments behind ``mpi-ef reproduce``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpi_ef.collectives import chunk_bounds
from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.compress import Identity, TopK
from mpi_ef.errors import DataError
from mpi_ef.feedback.theory import step_size
from mpi_ef.jobs.reproduce import figures
from mpi_ef.jobs.reproduce.libsvm import content_of, load_libsvm, split_rows
from mpi_ef.jobs.reproduce.outcome import Outcome, ReproduceConfig
from mpi_ef.jobs.reproduce.problems import (
    LogisticRegression,
    Quadratics,
    Vector,
    rare_features,
    smoothness,
    zeta_quadratics,
)
from mpi_ef.jobs.reproduce.simulate import Curve, descend

__all__ = ["bidirectional", "counterexample", "econtrol", "ef21", "participation", "rare", "speedup", "stability",
           "weights"]

Curves = dict[str, Curve]


def own_clients(comm: MpiComm, n: int) -> range:
    """Return the clients that this rank carries."""
    bounds, rank = chunk_bounds(n, comm.Get_size()), comm.Get_rank()
    return range(bounds[rank], bounds[rank + 1])


def carriers(comm: MpiComm, n: int) -> Any:
    """Return a communicator for n clients: `comm`, or where it has more ranks than that, each rank by itself. Collective."""
    return comm if n >= comm.Get_size() else comm.Split(comm.Get_rank())


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
                    "with its folder")


def logistic_regression(comm: MpiComm, folder: Path, name: str, n: int) -> LogisticRegression:
    """Return this rank's part of the regression on a LIBSVM file, dealt out to n clients in order. Collective."""
    found = []

    def facts() -> dict[str, object]:
        found.append(load_libsvm(data_file(folder, name)))
        return {f"the content of {name}": content_of(*found[0])}

    agree(comm, "reproduce", facts, "give all ranks the same files")
    ((a, b),) = found
    parts = split_rows(b, n)
    return LogisticRegression([(a[parts[c]], b[parts[c]]) for c in own_clients(comm, n)], content=content_of(a, b))


# set: (k, multiple of the theory's step size) as tuned on the authors' poster, and steps for about as many bits as there.
POSTER = {
    "phishing": ({"ef21": (1, 16), "ef14": (1, 16), "ef21-plus": (1, 256), "gd": (68, 1)}, 650),
    "mushrooms": ({"ef21": (2, 1024), "ef14": (2, 64), "ef21-plus": (1, 4096), "gd": (112, 4)}, 3500),
    "a9a": ({"ef21": (4, 64), "ef14": (4, 64), "ef21-plus": (1, 2048), "gd": (123, 2)}, 1500),
    "w8a": ({"ef21": (1, 64), "ef14": (1, 32), "ef21-plus": (1, 2048), "gd": (300, 4)}, 1500),
}


def ef21(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21, EF14, EF21+ and gradient descent on four sets, 20 clients, with the tuned step sizes. Collective."""
    n, curves, data = 20, dict[str, Curves](), dict[str, str]()
    lines = ["set        rule          k  factor  steps   bits sent  as papers count  least ||grad f||^2       last"]
    for name, (runs, steps) in POSTER.items():
        problem = logistic_regression(comm, config.folder, name, n)
        data[name] = problem.content
        constants = smoothness(comm, problem, n)
        x0 = np.random.RandomState(0).normal(size=problem.d)
        curves[name] = {}
        for rule, (k, factor) in runs.items():
            compressor = Identity() if rule == "gd" else TopK(k=k)
            alpha = compressor.alpha(problem.d)
            gamma = factor * step_size("gd" if rule == "gd" else "ef21", constants, alpha)
            _, curve = descend(comm, problem, n, "ef21" if rule == "gd" else rule, compressor, gamma=gamma,
                               steps=config.steps or steps, x0=x0, dense_steps=int(rule != "ef14"), every=10,
                               tolerance=1e-30)
            curves[name][rule] = curve
            lines.append(f"{name:<10} {rule:<10} {k:4} {factor:7} {curve.steps[-1]:6} {curve.sent_bits[-1]:11.3g} "
                         f"{curve.paper_bits[-1]:16.3g} {min(curve.squared_norms):19.1e} "
                         f"{curve.squared_norms[-1]:10.1e}")
    return Outcome(rows_of(curves), "\n".join(lines), lambda path: figures.against_bits(curves, path), data)


def econtrol(comm: MpiComm, config: ReproduceConfig) -> Outcome:
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
        ):
            seen = ideal(comm, problem) if method == "EC-Ideal" else problem
            _, panel[method] = descend(comm, seen, n, rule, compressor, gamma=gamma, steps=config.steps or 3000, x0=x0,
                                       dense_steps=int(rule in ("ef21", "econtrol")), every=20, options=options)
            lines.append(f"{zeta:5g} {method:<10} {panel[method].squared_norms[-1]:.1e}")
    return Outcome(rows_of(curves), "\n".join(lines), lambda path: figures.against_bits(curves, path))


def ideal(comm: MpiComm, problem: Quadratics) -> Quadratics:
    """Return what EC-Ideal sees: gradients less those at the optimum, which in practice nobody knows. Collective."""
    gathered = comm.allgather((problem.scales, problem.shifts))
    scales, shifts = (np.concatenate([part[i] for part in gathered]) for i in range(2))
    optimum = shifts.mean(axis=0) / scales.mean()
    return Quadratics(problem.scales, problem.scales[:, None] * optimum)


def rows_of(panels: dict[str, Curves]) -> list[dict[str, Any]]:
    """Return the looks at all runs as rows of a metrics file."""
    return [
        {"panel": panel, "run": name, **row}
        for panel, curves in panels.items()
        for name, curve in curves.items()
        for row in curve.rows()
    ]


def gaussian_noise(sigma: float, d: int, seed: int) -> Callable[[int, int], Vector]:
    """Return noise of variance sigma^2 that is a function of client and step."""
    return lambda client, step: np.random.default_rng((seed, client, step)).normal(0.0, sigma / np.sqrt(d), d)


def floor(curve: Curve) -> float:
    """Return the mean of ||grad f||^2 over the last half of the looks."""
    return float(np.mean(curve.squared_norms[len(curve.squared_norms) // 2 :]))


def speedup(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run stochastic methods on least squares with more and more clients: where does the error stay? Collective."""
    d, alpha, gamma, sigma, zeta, sizes = 100, 0.1, 0.005, 10.0, 10.0, (1, 4, 16, 64)
    methods: dict[str, tuple[str, dict[str, float]]] = {
        "SGD": ("ef21", {}), "EC-Ideal": ("ef14", {}), "EC": ("ef14", {}), "EF21-SGD": ("ef21", {}),
        "EF21-SGDM": ("ef21-sgdm", {"eta": 0.1}), "EControl": ("econtrol", {"eta": alpha}),
    }
    panels: dict[str, Curves] = {}
    for n in sizes:
        world = carriers(comm, n)
        problem = zeta_quadratics(own_clients(world, n), n, d, zeta, seed=1, equal=True)
        panel = panels[f"n = {n}"] = {}
        for method, (rule, options) in methods.items():
            seen = ideal(world, problem) if method == "EC-Ideal" else problem
            _, panel[method] = descend(world, seen, n, rule, Identity() if method == "SGD" else TopK(alpha), gamma=gamma,
                                       steps=config.steps or 4000, x0=np.ones(d), dense_steps=int(rule != "ef14"), every=20,
                                       noise=gaussian_noise(sigma, d, seed=2), options=options)
    floors = {method: [floor(panel[method]) for panel in panels.values()] for method in methods}
    lines = ["||grad f||^2 in the last half".ljust(12) + "".join(f"{f'n = {n}':>10}" for n in sizes)]
    lines += [f"{method:<29}" + "".join(f"{value:10.2g}" for value in values) for method, values in floors.items()]
    return Outcome(rows_of(panels), "\n".join(lines), lambda path: figures.floors(floors, sizes, path))


def stability(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EControl over its feedback eta and the step size. Collective."""
    n, d, alpha, zeta = 10, 100, 0.1, 10.0
    problem = zeta_quadratics(own_clients(comm, n), n, d, zeta, seed=1)
    gamma = step_size("ef21", smoothness(comm, problem, n), alpha)
    etas, factors = (1 / 400, 0.05, 0.1, 0.3, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    last, panels = np.empty((len(etas), len(factors))), dict[str, Curves]()
    for i, eta in enumerate(etas):
        panel = panels[f"eta = {eta:g} delta"] = {}
        for j, factor in enumerate(factors):
            _, curve = descend(comm, problem, n, "econtrol", TopK(alpha), gamma=factor * gamma, steps=config.steps or 2000,
                               x0=np.ones(d), every=50, options={"eta": eta * alpha})
            last[i, j] = min(curve.squared_norms[-1], 1e30)
            panel[f"{factor:g} gamma"] = curve
    lines = ["eta / delta".ljust(12) + "".join(f"{f'{factor:g} gamma':>11}" for factor in factors)]
    lines += [f"{eta:<12g}" + "".join(f"{value:11.1e}" for value in row) for eta, row in zip(etas, last, strict=True)]
    return Outcome(rows_of(panels), "\n".join(lines), lambda path: figures.stability(last, etas, factors, path))


def counterexample(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21-SGD and its remedies on ||x||^2 / 2 in two dimensions with noise that Top-1 mistakes. Collective."""
    points = np.sqrt(0.3) * np.array([[2.0, 0.0], [0.0, 1.0], [-2.0, -1.0]])  # of variance 1
    curves: dict[str, Curves] = {}

    def noise(client: int, step: int) -> Vector:
        point: Vector = points[np.random.default_rng((3, client, step)).integers(3)]
        return point

    lines = ["gamma     EF21-SGD  EF21-SGDM  EControl   (mean ||grad f||^2 in the last half)"]
    for gamma in (0.02, 0.005, 0.00125):
        panel = curves[f"gamma = {gamma:g}"] = {}
        for method, rule, options in (("EF21-SGD", "ef21", {}), ("EF21-SGDM", "ef21-sgdm", {"eta": min(1.0, 10 * gamma)}),
                                      ("EControl", "econtrol", {"eta": 0.5})):
            one = Quadratics(np.ones(1), np.zeros((1, 2)))
            _, panel[method] = descend(carriers(comm, 1), one, 1, rule, TopK(k=1), gamma=gamma,
                                       steps=config.steps or 20_000, x0=np.ones(2), every=10, noise=noise,
                                       options=options)
        lines.append(f"{gamma:<10g}" + "".join(f"{floor(panel[m]):<11.2g}" for m in panel))
    return Outcome(rows_of(curves), "\n".join(lines), lambda path: figures.against_steps(curves, path))


def participation(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21-PP with fewer and fewer of 20 clients, Top-1, on phishing: the best factor halves with them. Collective."""
    n, panels = 20, dict[str, Curves]()
    lines = ["participation  factor   steps  bits sent  ||grad f||^2"]
    problem = logistic_regression(comm, config.folder, "phishing", n)
    constants = smoothness(comm, problem, n)
    x0 = np.random.RandomState(0).normal(size=problem.d)
    panel = panels["phishing"] = {}
    for share, factor in ((1.0, 16), (0.5, 8), (0.25, 4), (0.125, 2)):
        gamma = factor * step_size("ef21", constants, 1 / problem.d)
        _, curve = descend(comm, problem, n, "ef21-pp", TopK(k=1), gamma=gamma, steps=config.steps or 5000, x0=x0, every=20,
                           tolerance=1e-14, options={"participation": share})
        panel[f"{share:.1%} of the clients"] = curve
        lines.append(
            f"{share:<13.1%} {factor:7} {curve.steps[-1]:7} {curve.sent_bits[-1]:10.3g}  {curve.squared_norms[-1]:.1e}"
        )
    return Outcome(
        rows_of(panels),
        "\n".join(lines),
        lambda path: figures.against_bits(panels, path),
        {"phishing": problem.content},
    )


def bidirectional(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21-BC on phishing: Top-2 up, and less and less down. Collective."""
    n, panels = 20, dict[str, Curves]()
    lines = ["down      steps  bits up   ||grad f||^2"]
    problem = logistic_regression(comm, config.folder, "phishing", n)
    gamma = 8 * step_size("ef21", smoothness(comm, problem, n), 2 / problem.d)
    x0 = np.random.RandomState(0).normal(size=problem.d)
    panel = panels["phishing"] = {}
    for k in (2, 4, 8, 16, problem.d):
        reply = TopK(k=k) if k < problem.d else Identity()
        _, curve = descend(comm, problem, n, "ef21-bc", TopK(k=2), gamma=gamma, steps=config.steps or 3000, x0=x0, every=20,
                           tolerance=1e-14, options={"reply": reply})
        name = f"Top-{k} down" if k < problem.d else "all down"
        panel[name] = curve
        lines.append(f"{name:<9}{curve.steps[-1]:6} {curve.sent_bits[-1]:8.3g}   {curve.squared_norms[-1]:.1e}")
    return Outcome(
        rows_of(panels),
        "\n".join(lines),
        lambda path: figures.against_steps(panels, path),
        {"phishing": problem.content},
    )


def weights(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21 and EF21-W with 1000 clients that are smooth to different degrees. Collective."""
    n, d, panels = 1000, 20, dict[str, Curves]()
    alpha, tolerance = 1 / d, 1e-6
    lines = ["spread  L_QM / L_AM  step sizes, W to EF21  steps EF21  steps EF21-W  saved"]
    for spread in (0.0, 1.0, 2.0):
        scales = np.random.default_rng(4).lognormal(0.0, spread, n)
        scales *= n / scales.sum()
        own = own_clients(comm, n)
        problem = Quadratics(scales[own.start : own.stop],
                             np.array([np.random.default_rng((5, client)).normal(size=d) for client in own]))
        constants, needed = smoothness(comm, problem, n), {}
        gammas = {rule: step_size(rule, constants, alpha) for rule in ("ef21", "ef21-w")}
        panel = panels[f"spread {spread:g}"] = {}
        for rule, gamma in gammas.items():
            _, panel[rule] = descend(comm, problem, n, rule, TopK(k=1), gamma=gamma, steps=config.steps or 1500,
                                     x0=np.ones(d), every=5, tolerance=tolerance,
                                     weights=scales / n if rule == "ef21-w" else None)
            needed[rule] = panel[rule].steps[-1]
        lines.append(f"{spread:<6g} {constants.quadratic_mean / constants.arithmetic_mean:12.2f} "
                     f"{gammas['ef21-w'] / gammas['ef21']:23.2f} {needed['ef21']:11} {needed['ef21-w']:13} "
                     f"{1 - needed['ef21-w'] / needed['ef21']:6.0%}")
    return Outcome(rows_of(panels), "\n".join(lines), lambda path: figures.against_steps(panels, path))


def rare(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21 on least squares whose features few clients know, with the step sizes of three analyses. Collective."""
    n, d, panels = 100, 500, dict[str, Curves]()
    lines = ["               step size, EF21 = 1     ||grad f||^2 at the end",
             "c / n     c    r  support  rare features      EF21   support      rare        GD"]
    for share in (0.05, 0.5, 0.9):
        owners = int(np.ceil(share * n))
        problem = rare_features(own_clients(comm, n), n, d, owners)
        constants = smoothness(comm, problem, n)
        most = max(comm.allgather(max(int((a != 0).any(axis=0).sum()) for a, _ in problem.parts)))
        gammas = {
            "EF21": step_size("ef21", constants, 1 / d),
            "EF21, alpha of the support": step_size("ef21", constants, 1 / most),
            "EF21, rare features": step_size("ef21-rare", constants, 1 / most, c=owners),
            "GD": step_size("gd", constants, 1.0),
        }
        panel = panels[f"c / n = {share:g}"] = {}
        for method, gamma in gammas.items():
            compressor = Identity() if method == "GD" else TopK(k=1)
            _, panel[method] = descend(comm, problem, n, "ef21", compressor, gamma=gamma, steps=config.steps or 10_000,
                                       x0=np.zeros(d), dense_steps=0, every=50, tolerance=1e-12)
        plain, support, rarely, _ = gammas.values()
        lines.append(f"{share:<6g} {owners:4} {most:4} {support / plain:8.2f} {rarely / plain:14.2f}"
                     + "".join(f"{curve.squared_norms[-1]:10.1e}" for curve in panel.values()))
    compressed = {name: {m: curve for m, curve in panel.items() if m != "GD"} for name, panel in panels.items()}
    return Outcome(rows_of(panels), "\n".join(lines), lambda path: figures.against_steps(compressed, path))
