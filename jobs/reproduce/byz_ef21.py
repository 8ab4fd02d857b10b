"""Byz-EF21 and Byz-EF21-SGDM under attack (Rammal et al. 2024, arXiv 2310.09804), with virtual clients.

Wrong clients are bound to the wire as the others are: they send C(target - g_j), with the target of the attack in place of
their gradient or of its average, also in the first step, which is dense.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives import RobustMean
from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import Comm, MpiComm
from mpi_ef.compress import Compressor, Source, TopK
from mpi_ef.errors import DataError, NonFiniteError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.feedback.theory import Smoothness, step_size
from mpi_ef.jobs.reproduce import figures
from mpi_ef.jobs.reproduce.attacks import Attack, Attacker, attacks_in
from mpi_ef.jobs.reproduce.clients import Drawer, Gathered, Images, Mlp, Shards, digits
from mpi_ef.jobs.reproduce.experiments import CLIENTS, carriers, logistic_regression, own_clients
from mpi_ef.jobs.reproduce.monna import demanded, verdicts
from mpi_ef.jobs.reproduce.outcome import Outcome, ReproduceConfig
from mpi_ef.jobs.reproduce.problems import LogisticRegression, Vector
from mpi_ef.jobs.reproduce.simulate import Curve
from mpi_ef.robust import NNM, Aggregator, GeometricMedian, Krum, Mean, Median, TrimmedMean, aggregate

__all__ = ["Swarm", "byz_ef21"]

N, F = CLIENTS, 4
RULES: Mapping[str, Aggregator] = {
    "mean": Mean(), "trimmed mean": TrimmedMean(), "median": Median(), "RFA": GeometricMedian(), "Krum": Krum(),
    "NNM, trimmed mean": NNM(TrimmedMean()), "NNM, median": NNM(Median())}
_SEEDS, _EVERY = 3, 20
_TRAINING = 400  # steps on digits
_MEASURED = 20  # steps between measurements
_LOST = 1e300  # ||grad f||^2 of what has become NaN or Inf
Matrix = NDArray[Any]
Lines = list[str]


class _Garbled(RobustMean):
    """Wrong clients of which the bytes are random."""

    seed, wrong = 0, N

    def encode(self, x: Source, *, split: bool) -> bool:
        """Overwrite the messages of wrong clients, see :meth:`RobustMean.encode`."""
        done: bool = super().encode(x, split=split)
        for row, j in enumerate(np.flatnonzero(self._participates).tolist()):
            if self.first + j >= self.wrong:
                key = [self.seed, self.exchanges * self.clients + self.first + j]
                random = np.random.Generator(np.random.Philox(key=key))
                self._send[row] = np.frombuffer(random.bytes(self._send[row].size), np.uint8)
        return done


class Swarm:
    """n clients of which the last f are wrong, of which this rank carries a run. Construction and steps are collective.

    Parameters
    ----------
    comm : Comm
    aggregator, compressor : Aggregator, Compressor
    attack : Attack
    d, dtype : int, numpy dtype
    eta : float
        Of the clients' averages ``v_i = (1 - eta) v_i + eta gradient_i``; with 1 it is Byz-EF21.
    feedback : bool
        False: the aggregate is of C(v_i) in place of what differences add up to, and wrong clients send whole vectors.
    """

    def __init__(self, comm: Comm, aggregator: Aggregator, compressor: Compressor, attack: Attack, d: int, dtype: Any, *,
                 eta: float = 1.0, feedback: bool = True, seed: int = 0, every: int = _EVERY, n: int = N,
                 f: int = F) -> None:
        self.aggregator, self.attack, self.eta, self.f, self.honest = aggregator, attack, eta, f, n - f
        kind = _Garbled if attack.name == "garbage" else RobustMean
        self.plan = kind(comm, compressor, d, dtype, aggregator, f=f, clients=n)
        if isinstance(self.plan, _Garbled):
            self.plan.seed, self.plan.wrong = seed, self.honest
        self.own = slice(self.plan.first, self.plan.first + self.plan.own)
        self.attacker = Attacker(attack, f, seed=seed, every=every)
        self.steps = 0
        rule = "byz-ef21" if eta == 1.0 else f"byz-ef21-sgdm(eta={eta})"
        self._feedback = ErrorFeedback(rule, self.plan, dense_steps=1) if feedback else None
        self._gathered = Gathered(comm, n, d, dtype)
        self._averages = np.zeros((n, d), dtype)  # of what all clients compute, v_i of the honest ones
        self._sent = np.zeros((self.plan.own, d), dtype)  # v_i of this rank's clients, wrong ones too

    def step(self, gradients: Matrix) -> Matrix:
        """Return the aggregate, (d,), of the gradients of this rank's clients, (own, d)."""
        every = self._gathered(gradients)
        eta = 1.0 if self.steps == 0 else self.eta
        self._averages += eta * (every - self._averages)
        made = self._with_feedback(eta) if self._feedback is not None else self._without()
        self.steps += 1
        return made

    def _targets(self, rows: Matrix) -> Matrix:
        """Return what wrong clients want to be taken for, (f, d), where these are the vectors of all."""
        honest = rows[: self.honest]
        mean = honest.mean(axis=0, dtype=np.float64)

        def damage(vector: Matrix) -> float:
            away = aggregate(np.concatenate([honest, np.tile(vector, (self.f, 1))]), self.aggregator, f=self.f,
                             step=self.steps) - mean
            return float(away @ away)

        if self.attack.name == "garbage":  # of the wire
            return rows[self.honest :]
        if self.attack.name == "silent":
            return np.full_like(rows[self.honest :], np.nan)
        return self.attacker.rows(honest, self.steps, damage, own=rows[self.honest :])

    def _with_feedback(self, eta: float) -> Matrix:
        if self._feedback is None:
            raise ValueError("there is no feedback")
        wanted = self._averages.copy()
        wanted[self.honest :] = self._targets(self._averages)
        mine = np.ascontiguousarray(wanted[self.own])
        given = mine if eta == 1.0 else (mine - (1.0 - eta) * self._sent) / eta
        self._sent = np.where(np.isfinite(mine).all(axis=1, keepdims=True), mine, self._sent)  # else v_i stays as it was
        result: Matrix = self._feedback.step(np.ascontiguousarray(given, self.plan.dtype))
        return result

    def _without(self) -> Matrix:
        self.plan.exchange(np.ascontiguousarray(self._averages[self.own]).reshape(-1))
        rows = np.zeros_like(self._averages)
        for client, row in enumerate(rows):
            self.plan.add_message(client, row)
        rows[self.honest :] = self._targets(rows)
        return aggregate(rows, self.aggregator, f=self.f, step=self.steps)


def _poisoned(problem: LogisticRegression, first: int) -> LogisticRegression:
    """Return a problem, of clients from `first` on, of which the labels of wrong ones are the other ones."""
    return replace(problem, parts=[(a, -b if first + i >= N - F else b) for i, (a, b) in enumerate(problem.parts)])


Regression = tuple[LogisticRegression, Smoothness, Vector]


class Runs:
    """The runs of the experiment. Methods that do one are collective."""

    def __init__(self, comm: MpiComm, config: ReproduceConfig) -> None:
        self.comm, self.config, self.world = comm, config, carriers(comm, N)
        self.every = config.search_every or _EVERY
        self.curves: dict[str, dict[str, Curve]] = {}  # by panel, set and attack, and by rule
        self.trained: dict[tuple[str, str, str], list[float]] = {}  # by rule, form and attack, accuracies of all seeds
        self.data: dict[str, str] = {}

    def attacks(self, text: str) -> list[Attack]:
        """Return the attacks that were asked for, or those of a table."""
        return attacks_in(self.config.attack or text)

    def say(self, text: str) -> None:
        """Print how far it is."""
        if self.comm.Get_rank() == 0:
            print(text, flush=True)

    def regression(self, name: str, *, shuffled: bool = False) -> Regression | None:
        """Return what there is of a LIBSVM set; None where one rank has no such file."""
        try:
            found = logistic_regression(self.world, self.config.folder, name, shuffled=shuffled)
        except DataError:
            found = None
        if not all(self.comm.allgather(found is not None)):
            return None
        if found is not None:
            self.data[name] = found[0].content
        return found

    def descend(self, panel: str, found: Regression, rule: str, attack: Attack, k: int, factor: float, steps: int, *,
                feedback: bool = True) -> Curve:
        """Do a run with `factor` times the step size of EF21's theory; measure the gradient of honest clients."""
        problem, constants, x0 = found
        compressor = TopK(k=k)
        gamma, steps = factor * step_size("ef21", constants, compressor.alpha(problem.d)), self.config.steps or steps
        swarm = Swarm(self.world, RULES[rule], compressor, attack, problem.d, np.float64, feedback=feedback,
                      every=self.every)
        seen = _poisoned(problem, swarm.plan.first) if attack.name == "label-flip" else problem
        everybody = Gathered(self.world, N, problem.d, np.float64)
        x, curve = x0.copy(), Curve()
        with np.errstate(all="ignore"):  # an attack may succeed
            for step in range(steps + 1):
                gradients = seen.gradients(x)
                if step % _MEASURED == 0 or step == steps:
                    full = everybody(gradients)[: N - F].mean(axis=0)
                    bits = 8.0 * swarm.plan.all_message_nbytes / N
                    curve.append(step, min(float(np.nan_to_num(full @ full, nan=_LOST)), _LOST), bits,
                                 32.0 * k * min(step, steps))
                if step == steps:
                    break
                try:
                    x = x - gamma * swarm.step(gradients)
                except NonFiniteError:  # of honest clients too: the attack has succeeded
                    curve.append(step + 1, _LOST, curve.sent_bits[-1], curve.paper_bits[-1])
                    break
        self.curves.setdefault(f"{panel}, {attack}", {})[rule if feedback else f"{rule}, no feedback"] = curve
        return curve

    def train(self, images: Images, rule: str, form: str, attack: Attack, seed: int, *, eta: float, feedback: bool,
              steps: int = _TRAINING) -> float:
        """Train a small network with Top-5 %, and return its test accuracy."""
        model, steps = Mlp(images.x.shape[1]), self.config.steps or steps
        swarm = Swarm(self.world, RULES[rule], TopK(0.05), attack, model.d, np.float32, eta=eta, feedback=feedback,
                      seed=seed, every=self.every)
        shards, own = Shards(images.y, N - F, 1.0, seed), own_clients(self.world, N)
        drawers: list[Drawer] = [shards.drawer(client, client % (N - F)) for client in own]
        wrong = np.array([client >= N - F for client in own], np.bool_)
        theta = model.initial(seed)
        with np.errstate(all="ignore"):
            for step in range(steps):
                drawn = np.array([drawer.batch(5) for drawer in drawers], np.int64)
                labels = images.y[drawn]
                if attack.name == "label-flip":
                    labels[wrong] = model.classes - 1 - labels[wrong]
                gradients = model.gradients(np.tile(theta, (len(own), 1)), images.x[drawn], labels)
                try:
                    theta -= np.float32(0.5 / (1 + step // 100)) * swarm.step(gradients)
                except NonFiniteError:
                    break
            accuracy = model.accuracy(theta, images.test_x, images.test_y)
        self.trained.setdefault((rule, form, str(attack)), []).append(accuracy)
        return accuracy

    def last(self, panel: str, rule: str) -> float:
        """Return where a run has ended."""
        return self.curves[panel][rule].squared_norms[-1]

    def accuracy(self, rule: str, form: str, attack: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.trained[rule, form, attack]))


_FORMS: Mapping[str, dict[str, Any]] = {
    "EF21, eta .1": {"eta": 0.1, "feedback": True}, "EF21, eta 1": {"eta": 1.0, "feedback": True},
    "no feedback, eta .1": {"eta": 0.1, "feedback": False}}
_TRAINED = ("mean", "trimmed mean", "NNM, trimmed mean", "RFA")
_BEST = "NNM, trimmed mean"


def byz_ef21(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Run aggregators under attack: logistic regression on phishing and a9a, a small network on digits. Collective."""
    runs = Runs(comm, config)
    lines = [*_phishing(runs), "", *_a9a(runs), "", *_digits(runs)]
    rows = [{"panel": panel, "run": name, **row} for panel, curves in runs.curves.items()
            for name, curve in curves.items() for row in curve.rows()]
    rows += [{"panel": f"digits, {attack}", "run": f"{rule}, {form}", "seed": seed, "step": config.steps or _TRAINING,
              "accuracy": accuracy}
             for (rule, form, attack), found in runs.trained.items() for seed, accuracy in enumerate(found)]
    lines += ["", f"factors of alie and foe are searched every {runs.every} steps", "",
              *demanded(config.steps, lambda: _acceptance(runs))]
    shown = {panel: curves for panel, curves in runs.curves.items() if "shuffled" not in panel}
    return Outcome(rows, "\n".join(lines), lambda path: figures.against("steps")(shown, path) if shown else None, runs.data)


def _table(title: str, head: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]) -> Lines:
    lines = [title, f"{'':40}" + "".join(f"{word:>12}" for word in head)]
    return lines + [f"{name:40}{''.join(f'{cell:>12}' for cell in cells)}".rstrip() for name, cells in rows]


def _end(squared_norm: float) -> str:
    return "lost" if squared_norm >= _LOST else f"{squared_norm:.1e}"


def _phishing(runs: Runs) -> Lines:
    """Return ||grad f||^2 of honest clients by order of the rows, rule and attack."""
    attacks = runs.attacks("none, sign-flip, ipm(2), huge, alie, label-flip, mimic")
    lines: Lines = []
    for order in ("file order", "shuffled"):
        if (found := runs.regression("phishing", shuffled=order == "shuffled")) is None:
            return [f"phishing: skipped, {runs.config.folder} has no such file"]
        table = []
        for rule in RULES:
            ends = [runs.descend(f"phishing, {order}", found, rule, attack, 3, 8.0, 600).squared_norms[-1]
                    for attack in attacks]
            table.append((rule, [_end(end) for end in ends]))
            runs.say(f"phishing, {order}, {rule}: {' '.join(table[-1][1])}")
        title = f"phishing, rows {order.replace('file', 'in file')}, Top-3: ||grad f||^2 of honest clients at the end"
        lines += [*([""] if lines else []), *_table(title, map(str, attacks), table)]
    return lines


def _a9a(runs: Runs) -> Lines:
    """Return the same of a9a, and of rules that see bare messages."""
    if (found := runs.regression("a9a")) is None:
        return [f"a9a: skipped, {runs.config.folder} has no such file"]
    attacks, table = runs.attacks("none, huge, label-flip, alie"), []
    for rule in _TRAINED:
        ends = [runs.descend("a9a", found, rule, attack, 6, 16.0, 250).squared_norms[-1] for attack in attacks]
        table.append((rule, [_end(end) for end in ends]))
        runs.say(f"a9a, {rule}: {' '.join(table[-1][1])}")
    for rule in ("trimmed mean", "median"):
        end = runs.descend("a9a", found, rule, Attack("none"), 6, 16.0, 250, feedback=False).squared_norms[-1]
        table.append((f"{rule} of bare messages", [_end(end) if attack.name == "none" else "" for attack in attacks]))
    return _table("a9a, Top-6: ||grad f||^2 of honest clients at the end", map(str, attacks), table)


def _digits(runs: Runs) -> Lines:
    """Return test accuracies by rule, form and attack."""
    images = digits()
    agree(runs.comm, "reproduce", lambda: {"the content of digits": images.content}, "give all ranks the same data")
    runs.data["digits"] = images.content
    attacks, seeds, table = runs.attacks("none, alie, sign-flip, ipm(5)"), range(runs.config.seeds or _SEEDS), []
    for form, settings in _FORMS.items():
        for rule in _TRAINED:
            for attack in attacks:
                for seed in seeds:
                    runs.train(images, rule, form, attack, seed, **settings)
            table.append((f"{rule}, {form}", [f"{runs.accuracy(rule, form, str(attack)):.3f}" for attack in attacks]))
            runs.say(f"digits, {form}, {rule}: {' '.join(table[-1][1])}")
    of = "one seed" if len(seeds) == 1 else f"means of {len(seeds)} seeds"
    return _table(f"digits, Top-5 %: test accuracy, {of}", map(str, attacks), table)


def _acceptance(runs: Runs) -> Lines:
    """Return what was demanded, by the design of these rules before they were built, and what was measured."""
    with_, without = "EF21, eta .1", "no feedback, eta .1"

    def lost(attack: str) -> Callable[[], float]:
        return lambda: runs.accuracy(_BEST, with_, "none") - runs.accuracy(_BEST, with_, attack)

    def gained(attack: str) -> Callable[[], float]:
        return lambda: runs.accuracy(_BEST, with_, attack) - runs.accuracy(_BEST, without, attack)

    def of_mean(attack: str) -> Callable[[], float]:
        return lambda: runs.accuracy("mean", with_, attack)

    huge = "phishing, file order, huge"
    return verdicts([
        *((f"digits, NNM and trimmed mean: accuracy lost to {attack}", "<= 0.04", lost(attack))
          for attack in ("alie", "sign-flip", "ipm(5)")),
        *((f"digits, mean: accuracy under {attack}", "<= 0.2", of_mean(attack)) for attack in ("alie", "ipm(5)")),
        *((f"digits, NNM and trimmed mean, {attack}: accuracy with - without feedback", ">= 0", gained(attack))
          for attack in ("alie", "sign-flip", "ipm(5)")),
        ("phishing, huge: mean", ">= 0.1", lambda: runs.last(huge, "mean")),
        ("phishing, huge: the worst of the others", "<= 1e-3",
         lambda: max(runs.last(huge, rule) for rule in RULES if rule != "mean")),
        ("phishing, label-flip: NNM and trimmed mean", "<= 1e-20",
         lambda: runs.last("phishing, file order, label-flip", _BEST)),
        ("phishing, sign-flip, trimmed mean: file order / shuffled", ">= 2",
         lambda: runs.last("phishing, file order, sign-flip", "trimmed mean")
         / runs.last("phishing, shuffled, sign-flip", "trimmed mean")),
    ])
