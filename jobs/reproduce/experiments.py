"""The experiments behind ``mpi-ef reproduce``."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpi_ef import registry
from mpi_ef.collectives import chunk_bounds
from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.compress import Compressor, Identity, TopK
from mpi_ef.errors import DataError
from mpi_ef.feedback.theory import Smoothness, step_size
from mpi_ef.jobs.methods import methods_in
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
from mpi_ef.jobs.reproduce.simulate import Curve, descend, kept

__all__ = ["CLIENTS", "bidirectional", "carriers", "counterexample", "econtrol", "ef21", "logistic_regression",
           "own_clients", "participation", "rare", "speedup", "stability", "weights"]

Methods = dict[str, tuple[str, Compressor]]  # by name: rule and compressor
CLIENTS = 20  # of the LIBSVM sets


class Panels:
    """The runs of an experiment, by panel and by name. Every method is collective."""

    def __init__(self, config: ReproduceConfig) -> None:
        self.config, self.curves = config, dict[str, dict[str, Curve]]()

    def descend(self, panel: str, name: str, *problem: Any, steps: int, **settings: Any) -> Curve:
        """Do one run, see :func:`descend`; of `steps` steps, unless there is ``--steps``."""
        _, curve = descend(*problem, steps=self.config.steps or steps, **settings)
        self.curves.setdefault(panel, {})[name] = curve
        return curve

    def compare(self, panel: str, comm: MpiComm, problem: Quadratics, n: int, methods: Methods,
                **settings: Any) -> dict[str, Curve]:
        """Do a run for each method; EC-Ideal has the problem without differences at the optimum."""
        for name, method in methods.items():
            seen = ideal(comm, problem) if name == "EC-Ideal" else problem
            self.descend(panel, name, comm, seen, n, *method, **settings)
        return self.curves[panel]

    def outcome(self, lines: list[str], draw: Callable[[Any, Path], None], data: dict[str, str] | None = None) -> Outcome:
        """Return all measurements, the table, and what draws the panels."""
        rows = [{"panel": panel, "run": name, **row} for panel, curves in self.curves.items()
                for name, curve in curves.items() for row in curve.rows()]
        return Outcome(rows, "\n".join(lines), partial(draw, self.curves), data or {})


def methods_of(config: ReproduceConfig, own: Mapping[str, str]) -> Methods:
    """Return the methods that an experiment compares: those of ``--methods``, or its own, each RULE COMPRESSOR."""
    texts = {" ".join(words): words for words in methods_in(config.methods, plans=False)}
    found = texts or {name: text.split(maxsplit=1) for name, text in own.items()}
    return {name: (rule, registry.built("compressor", compressor)) for name, (rule, compressor) in found.items()}


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


def logistic_regression(comm: MpiComm, folder: Path, name: str, *,
                        shuffled: bool = False) -> tuple[LogisticRegression, Smoothness, Vector]:
    """Return this rank's part of the regression on a LIBSVM file, rows as they are, its constants, x0. Collective."""
    found = []

    def facts() -> dict[str, object]:
        found.append(load_libsvm(data_file(folder, name)))
        return {f"the content of {name}": content_of(*found[0])}

    agree(comm, "reproduce", facts, "give all ranks the same files")
    ((a, b),) = found
    content, order = content_of(a, b), np.random.default_rng(0).permutation(b.size) if shuffled else slice(None)
    a, b = a[order], b[order]
    parts = split_rows(b.size, CLIENTS)
    own = [(a[parts[c]], b[parts[c]]) for c in own_clients(comm, CLIENTS)]
    problem = LogisticRegression(own, content=content)
    return problem, smoothness(comm, problem, CLIENTS), np.random.RandomState(0).normal(size=problem.d)


def ideal(comm: MpiComm, problem: Quadratics) -> Quadratics:
    """Return the problem of EC-Ideal: gradients less those at the optimum, which is unknown in practice. Collective."""
    gathered = comm.allgather((problem.scales, problem.shifts))
    scales, shifts = (np.concatenate([part[i] for part in gathered]) for i in range(2))
    optimum = shifts.mean(axis=0) / scales.mean()
    return Quadratics(problem.scales, problem.scales[:, None] * optimum)


def gaussian_noise(sigma: float, d: int, seed: int) -> Callable[[int, int], Vector]:
    """Return noise of variance sigma^2 that is a function of client and step."""
    return lambda client, step: np.random.default_rng((seed, client, step)).normal(0.0, sigma / np.sqrt(d), d)


def floor(curve: Curve) -> float:
    """Return the mean of ||grad f||^2 over the last half of the measurements."""
    return float(np.mean(curve.squared_norms[len(curve.squared_norms) // 2 :]))


# set: (k, multiple of the theory's step size) as tuned on the authors' poster, and steps for about as many bits as there.
POSTER = {
    "phishing": ({"ef21": (1, 16), "ef14": (1, 16), "ef21-plus": (1, 256), "gd": (68, 1)}, 650),
    "mushrooms": ({"ef21": (2, 1024), "ef14": (2, 64), "ef21-plus": (1, 4096), "gd": (112, 4)}, 3500),
    "a9a": ({"ef21": (4, 64), "ef14": (4, 64), "ef21-plus": (1, 2048), "gd": (123, 2)}, 1500),
    "w8a": ({"ef21": (1, 64), "ef14": (1, 32), "ef21-plus": (1, 2048), "gd": (300, 4)}, 1500),
}


def ef21(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21, EF14, EF21+ and gradient descent on four sets, 20 clients, with the tuned step sizes. Collective."""
    panels, data, lines = Panels(config), dict[str, str](), list[str]()
    for name, (runs, steps) in POSTER.items():
        problem, constants, x0 = logistic_regression(comm, config.folder, name)
        data[name] = problem.content
        own = {rule: "ef21 Identity" if rule == "gd" else f"{rule} TopK(k={k})" for rule, (k, _) in runs.items()}
        methods = methods_of(config, own)
        width = max(10, *map(len, methods))
        for method, (rule, compressor) in methods.items():
            _, factor = runs.get(method, (0, 1))
            gamma = factor * step_size("ef21", constants, compressor.alpha(problem.d))
            curve = panels.descend(name, method, comm, problem, CLIENTS, rule, compressor, gamma=gamma, steps=steps, x0=x0,
                                   every=10, tolerance=1e-30)
            lines.append(f"{name:<10} {method:<{width}} {kept(compressor, problem.d):4} {factor:7} {curve.steps[-1]:6} "
                         f"{curve.sent_bits[-1]:11.3g} {curve.paper_bits[-1]:16.3g} {min(curve.squared_norms):19.1e} "
                         f"{curve.squared_norms[-1]:10.1e}")
    head = f"{'set':<10} {'rule':<{width}}    k  factor  steps   bits sent  as papers count  least ||grad f||^2       last"
    return panels.outcome([head, *lines], figures.against("sent_bits", "paper_bits"), data)


def econtrol(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EControl, EC, EF21, EC-Ideal and naive compression on least squares whose clients disagree by zeta. Collective."""
    n, d, alpha, panels = 10, 100, 0.1, Panels(config)
    own = {"naive": "naive", "EC": "ef14", "EC-Ideal": "ef14", "EF21": "ef21", "EControl": f"econtrol(eta={0.3 * alpha})"}
    methods = methods_of(config, {name: f"{rule} TopK({alpha})" for name, rule in own.items()})
    width = max(10, *map(len, methods))
    lines = [f"{'zeta':>5} {'method':<{width}} ||grad f||^2 at the end"]
    for zeta in (0.0, 1.0, 10.0, 100.0):
        problem = zeta_quadratics(own_clients(comm, n), n, d, zeta, seed=1)
        gamma = step_size("ef21", smoothness(comm, problem, n), alpha)
        curves = panels.compare(f"zeta = {zeta:g}", comm, problem, n, methods, gamma=gamma, steps=3000, x0=np.ones(d),
                                every=20)
        lines += [f"{zeta:5g} {name:<{width}} {curve.squared_norms[-1]:.1e}" for name, curve in curves.items()]
    return panels.outcome(lines, figures.against("sent_bits", "paper_bits"))


def speedup(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run stochastic methods on least squares with more and more clients: where does the error stay? Collective."""
    d, alpha, sizes, panels = 100, 0.1, (1, 4, 16, 64), Panels(config)
    own = {"EC-Ideal": "ef14", "EC": "ef14", "EF21-SGD": "ef21", "EF21-SGDM": "ef21-sgdm(eta=0.1)",
           "EControl": f"econtrol(eta={alpha})"}
    methods = methods_of(config,
                         {"SGD": "ef21 Identity"} | {name: f"{rule} TopK({alpha})" for name, rule in own.items()})
    for n in sizes:
        world = carriers(comm, n)
        problem = zeta_quadratics(own_clients(world, n), n, d, 10.0, seed=1, equal=True)
        panels.compare(f"n = {n}", world, problem, n, methods, gamma=0.005, steps=4000, x0=np.ones(d), every=20,
                       noise=gaussian_noise(10.0, d, seed=2))
    floors = {method: [floor(panel[method]) for panel in panels.curves.values()] for method in methods}
    title = "||grad f||^2 in the last half"
    width = max(map(len, [title, *methods]))
    lines = [f"{title:<{width}}" + "".join(f"{f'n = {n}':>10}" for n in sizes)]
    lines += [f"{method:<{width}}" + "".join(f"{value:10.2g}" for value in values) for method, values in floors.items()]
    return panels.outcome(lines, lambda _, path: figures.floors(floors, sizes, path))


def stability(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EControl over its feedback eta and the step size. Collective."""
    n, d, alpha, panels = 10, 100, 0.1, Panels(config)
    problem = zeta_quadratics(own_clients(comm, n), n, d, 10.0, seed=1)
    gamma = step_size("ef21", smoothness(comm, problem, n), alpha)
    etas, factors = (1 / 400, 0.05, 0.1, 0.3, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    last = np.array([[
        min(1e30, panels.descend(f"eta = {eta:g} delta", f"{factor:g} gamma", comm, problem, n,
                                 f"econtrol(eta={eta * alpha})", TopK(alpha), gamma=factor * gamma, steps=2000,
                                 x0=np.ones(d), every=50).squared_norms[-1])
        for factor in factors] for eta in etas])
    lines = ["eta / delta".ljust(12) + "".join(f"{f'{factor:g} gamma':>11}" for factor in factors)]
    lines += [f"{eta:<12g}" + "".join(f"{value:11.1e}" for value in row) for eta, row in zip(etas, last, strict=True)]
    return panels.outcome(lines, lambda _, path: figures.stability(last, etas, factors, path))


def counterexample(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21-SGD and its remedies on ||x||^2 / 2 in two dimensions with noise that Top-1 mistakes. Collective."""
    points = np.sqrt(0.3) * np.array([[2.0, 0.0], [0.0, 1.0], [-2.0, -1.0]])  # of variance 1
    panels, problem, lines = Panels(config), Quadratics(np.ones(1), np.zeros((1, 2))), list[str]()

    def noise(client: int, step: int) -> Vector:
        point: Vector = points[np.random.default_rng((3, client, step)).integers(3)]
        return point

    for gamma in (0.02, 0.005, 0.00125):
        own = {"EF21-SGD": "ef21", "EF21-SGDM": f"ef21-sgdm(eta={min(1.0, 10 * gamma)})", "EControl": "econtrol(eta=0.5)"}
        methods = methods_of(config, {name: f"{rule} TopK(k=1)" for name, rule in own.items()})
        curves = panels.compare(f"gamma = {gamma:g}", carriers(comm, 1), problem, 1, methods, gamma=gamma, steps=20_000,
                                x0=np.ones(2), every=10, noise=noise)
        widths = {name: max(11, len(name) + 2) for name in curves}
        lines.append(f"{gamma:<10g}" + "".join(f"{floor(curves[name]):<{width}.2g}" for name, width in widths.items()))
    head = "gamma".ljust(10) + "".join(f"{name:<{width}}" for name, width in widths.items())
    return panels.outcome([f"{head}(mean ||grad f||^2 in the last half)", *lines], figures.against("steps"))


def participation(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21-PP with fewer and fewer of 20 clients, Top-1, on phishing: the best factor halves with them. Collective."""
    panels, lines = Panels(config), ["participation  factor   steps  bits sent  ||grad f||^2"]
    problem, constants, x0 = logistic_regression(comm, config.folder, "phishing")
    for share, factor in ((1.0, 16), (0.5, 8), (0.25, 4), (0.125, 2)):
        gamma = factor * step_size("ef21", constants, 1 / problem.d)
        curve = panels.descend("phishing", f"{share:.1%} of the clients", comm, problem, CLIENTS,
                               f"ef21-pp(participation={share})", TopK(k=1), gamma=gamma, steps=5000, x0=x0, every=20,
                               tolerance=1e-14)
        lines.append(f"{share:<13.1%} {factor:7} {curve.steps[-1]:7} {curve.sent_bits[-1]:10.3g}  "
                     f"{curve.squared_norms[-1]:.1e}")
    return panels.outcome(lines, figures.against("sent_bits", "paper_bits"), {"phishing": problem.content})


def bidirectional(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21-BC on phishing: Top-2 up, and less and less down. Collective."""
    panels, lines = Panels(config), ["down      steps  bits up   ||grad f||^2"]
    problem, constants, x0 = logistic_regression(comm, config.folder, "phishing")
    gamma = 8 * step_size("ef21", constants, 2 / problem.d)
    for k in (2, 4, 8, 16, problem.d):
        name, reply = (f"Top-{k} down", f"TopK(k={k})") if k < problem.d else ("all down", "Identity()")
        curve = panels.descend("phishing", name, comm, problem, CLIENTS, f"ef21-bc(reply={reply})", TopK(k=2), gamma=gamma,
                               steps=3000, x0=x0, every=20, tolerance=1e-14)
        lines.append(f"{name:<9}{curve.steps[-1]:6} {curve.sent_bits[-1]:8.3g}   {curve.squared_norms[-1]:.1e}")
    return panels.outcome(lines, figures.against("steps"), {"phishing": problem.content})


def weights(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21 and EF21-W with 1000 clients that are smooth to different degrees. Collective."""
    n, d, panels, target, unreached = 1000, 20, Panels(config), 1e-6, False
    lines = ["spread  L_QM / L_AM  step sizes, W to EF21  steps EF21  steps EF21-W  saved"]
    own = own_clients(comm, n)
    shifts = np.array([np.random.default_rng((5, client)).normal(size=d) for client in own])
    for spread in (0.0, 1.0, 2.0):
        scales = np.random.default_rng(4).lognormal(0.0, spread, n)
        scales *= n / scales.sum()
        problem = Quadratics(scales[own.start : own.stop], shifts)
        constants = smoothness(comm, problem, n)
        gammas = {rule: step_size(rule, constants, 1 / d) for rule in ("ef21", "ef21-w")}
        curves = [
            panels.descend(f"spread {spread:g}", rule, comm, problem, n, rule, TopK(k=1), gamma=gamma, steps=1500,
                           x0=np.ones(d), every=5, tolerance=target, weights=scales / n if rule == "ef21-w" else None)
            for rule, gamma in gammas.items()]
        reached = [curve.squared_norms[-1] < target for curve in curves]
        unreached |= not all(reached)
        plain, weighted = (f"{'' if done else '> '}{curve.steps[-1]}" for done, curve in zip(reached, curves, strict=True))
        saved = f"{1 - curves[1].steps[-1] / curves[0].steps[-1]:.0%}" if all(reached) else "-"
        lines.append(f"{spread:<6g} {constants.quadratic_mean / constants.arithmetic_mean:12.2f} "
                     f"{gammas['ef21-w'] / gammas['ef21']:23.2f} {plain:>11} {weighted:>13} {saved:>6}")
    if unreached:
        lines.append(f">: ||grad f||^2 < {target:g} was not reached in so many steps; give more --steps")
    return panels.outcome(lines, figures.against("steps"))


def rare(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run EF21 on least squares whose features few clients have, with the step sizes of three analyses. Collective."""
    n, d, panels = 100, 500, Panels(config)
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
        ends = [
            panels.descend(f"c / n = {share:g}", method, comm, problem, n, "ef21",
                           Identity() if method == "GD" else TopK(k=1), gamma=gamma, steps=10_000, x0=np.zeros(d),
                           dense_steps=0, every=50, tolerance=1e-12).squared_norms[-1]
            for method, gamma in gammas.items()]
        plain, support, rarely, _ = gammas.values()
        lines.append(f"{share:<6g} {owners:4} {most:4} {support / plain:8.2f} {rarely / plain:14.2f}"
                     + "".join(f"{end:10.1e}" for end in ends))
    compressed = {name: {m: curve for m, curve in panel.items() if m != "GD"} for name, panel in panels.curves.items()}
    return panels.outcome(lines, lambda _, path: figures.against("steps")(compressed, path))
