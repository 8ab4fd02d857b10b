"""Constants and step sizes of the theory, as the papers state them.

Letters: alpha is the contraction constant of a compressor, ``E||C(x) - x||^2 <= (1 - alpha) ||x||^2``; omega the variance of
an unbiased one, ``E||Q(x) - x||^2 <= omega ||x||^2``; f is the mean of the clients' f_i, L the smoothness constant of f and
L_i that of f_i.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from mpi_ef.errors import OptionError, briefly
from mpi_ef.ranges import within

__all__ = ["Smoothness", "beta", "step_size", "theta", "three_point", "xi"]


def theta(alpha: float) -> float:
    """Return ``1 - sqrt(1 - alpha)``: by this factor the error of an EF21 estimate shrinks in a step (arXiv 2106.05203)."""
    return 1.0 - sqrt(1.0 - _checked("alpha", alpha))


def beta(alpha: float) -> float:
    """Return ``(1 - alpha) / (1 - sqrt(1 - alpha))``: how much a change of the gradient adds to that error."""
    return (1.0 - alpha) / theta(alpha)


def xi(alpha: float) -> float:
    """Return ``sqrt(beta / theta) = (1 + sqrt(1 - alpha)) / alpha - 1``; 0 for a lossless compressor."""
    return (1.0 + sqrt(1.0 - _checked("alpha", alpha))) / alpha - 1.0


def _checked(name: str, value: float, least: float = 0.0, most: float = 1.0) -> float:
    within("theory", f"({least:g}, {most:g}]", "see the paper", **{name: value})
    return value


@dataclass(frozen=True)
class Smoothness:
    """Smoothness constants of ``f = mean_i f_i``."""

    whole: float  # L, of f
    clients: tuple[float, ...]  # L_i, one of each client

    def __post_init__(self) -> None:
        if not self.clients or not all(isfinite(c) and c > 0 for c in (self.whole, *self.clients)):
            raise OptionError(f"Smoothness: L={self.whole}, L_i={self.clients[:4]}...; pass positive numbers, one L_i a "
                              "client")

    @property
    def arithmetic_mean(self) -> float:
        """L_AM."""
        return sum(self.clients) / len(self.clients)

    @property
    def quadratic_mean(self) -> float:
        """L_QM, called L tilde in the papers."""
        return sqrt(sum(c * c for c in self.clients) / len(self.clients))

    def reach(self, point_clients: int) -> float:
        """Return L_+ of the analysis for rare features, ``min(L_QM, sqrt(c / n) max_i L_i)``.

        c, `point_clients`, is the greatest number of clients that own the same feature.
        """
        n = len(self.clients)
        if not 1 <= point_clients <= n:
            raise OptionError(f"theory: c={point_clients} is not in 1 ... n={n}; count the clients that own a feature")
        return min(self.quadratic_mean, sqrt(point_clients / n) * max(self.clients))


def three_point(alpha: float, *, zeta: float = 0.0) -> tuple[float, float]:
    """Return (A, B) of EF21 and, with `zeta`, of CLAG in the sense of 3PC (arXiv 2202.00998); LAG is alpha = 1.

    ``E||C_{h,y}(x) - x||^2 <= (1 - A) ||h - y||^2 + B ||x - y||^2``.
    """
    within("theory", "[0, inf)", "0 never keeps silent", zeta=zeta)
    return theta(alpha), max(beta(alpha), zeta)


def _ef21(s: Smoothness, reach: float, alpha: float, mu: float | None = None) -> float:
    """Nonconvex f, arXiv 2106.05203, theorem 1, ``1 / (L + reach xi)`` with reach = L_QM; theorem 2 with `mu`.

    ``min(1 / (L + reach xi sqrt(2)), theta / (2 mu))`` under the Polyak-Lojasiewicz condition ||grad f||^2 >= 2 mu (f - f*).
    """
    if mu is None:
        return 1.0 / (s.whole + reach * xi(alpha))
    return min(1.0 / (s.whole + reach * xi(alpha) * sqrt(2.0)), theta(alpha) / (2.0 * _checked("mu", mu, most=s.whole)))


def _sgdm(share: float, part: float) -> Callable[..., float]:
    def formula(s: Smoothness, alpha: float, *, eta: float) -> float:
        return min(alpha / (share * s.quadratic_mean), _checked("eta", eta) / (part * s.whole))

    return formula


def _clag(s: Smoothness, alpha: float, *, zeta: float = 1.0) -> float:
    a, b = three_point(alpha, zeta=zeta)
    return 1.0 / (s.whole + s.quadratic_mean * sqrt(b / a))


def _participating(s: Smoothness, reach: float, alpha: float, *, participation: float,
                   slack: float = 1e-3) -> float:
    """Partial participation with equal probabilities, as in the authors' code for arXiv 2305.15264."""
    p = _checked("participation", participation)
    if p == 1.0:
        return _ef21(s, reach, alpha)
    shrink = 1.0 - (1.0 + slack) * (1.0 - alpha)
    contraction = slack * p + shrink * p - slack
    if contraction <= 0:
        raise OptionError(f"theory: participation={p} with alpha={alpha}: the analysis of EF21-PP gives no step size; "
                          "take more clients, or more of each vector")
    growth = (1.0 + 1.0 / slack) * (1.0 - alpha)
    bracket = growth * p + (1.0 + 1.0 / slack) * (1.0 - p)
    return 1.0 / (s.whole + reach * sqrt(bracket / contraction))


def _marina(s: Smoothness, alpha: float, *, p: float | None = None) -> float:
    """Arxiv 2102.07845: omega = 1 / alpha - 1 for RandK, p = 1 / (1 + omega) = alpha by default."""
    omega, probability = 1.0 / _checked("alpha", alpha) - 1.0, _checked("p", alpha if p is None else p)
    return 1.0 / (s.whole * (1.0 + sqrt((1.0 - probability) * omega / (probability * len(s.clients)))))


# EF21-W: L_AM in the place of L_QM, arXiv 2402.10774. SGD, gradients of minibatches, of bounded variance: half of alpha.
# Young's inequality with rho = alpha / (2 (1 - alpha)) parts the noise of the new gradient from C(x) - x: what is
# left of the error is (1 + rho) (1 - alpha) = 1 - alpha / 2. Noise changes where the method stops, not its step size.
_STEP_SIZES: Mapping[str, Callable[..., float]] = {
    "gd": lambda s, _alpha: 1.0 / s.whole,
    "ef21": lambda s, alpha, *, mu=None: _ef21(s, s.quadratic_mean, alpha, mu),
    "ef21-plus": lambda s, alpha, *, mu=None: _ef21(s, s.quadratic_mean, alpha, mu),
    "ef21-w": lambda s, alpha, *, mu=None: _ef21(s, s.arithmetic_mean, alpha, mu),
    # Rare features, arXiv 2305.15264: alpha is k / r with at most r features on a client, c clients own a feature.
    "ef21-rare": lambda s, alpha, *, c: 1.0 / (s.whole + sqrt(c / len(s.clients)) * xi(alpha) * s.reach(c)),
    "ef21-sgd": lambda s, alpha: _ef21(s, s.quadratic_mean, alpha / 2),
    "ef21-w-sgd": lambda s, alpha: _ef21(s, s.arithmetic_mean, alpha / 2),
    "ef21-pp": lambda s, alpha, **options: _participating(s, s.quadratic_mean, alpha, **options),
    "ef21-w-pp": lambda s, alpha, **options: _participating(s, s.arithmetic_mean, alpha, **options),
    "ef21-sgdm": _sgdm(20.0, 7.0),  # arXiv 2305.15155, theorem 3
    "ef21-sgd2m": _sgdm(60.0, 16.0),
    "clag": _clag,
    "marina": _marina,
}

_WITHOUT = {
    "ef14": "its analysis needs bounded gradients; the papers tune it in multiples of the step size of ef21",
    "econtrol": "its constants are not public; tune it near the step size of ef21",
    "ef21-hb": "its constant is not certain; tune it below the step size of ef21",
    "ef21-bc": "its constant is not certain; tune it below the step size of ef21",
    "ef21-page": "its constant is not certain; tune it below the step size of ef21",
    "d-ec-sgd": "its analysis is for (strongly) convex f; tune it near the step size of ef21",
}


def step_size(rule: str, smoothness: Smoothness, alpha: float, **options: Any) -> float:
    """Return the largest step size that the theory of a rule admits for smooth nonconvex f.

    Parameters
    ----------
    rule : str
        A name in the table of rules, or "gd", "ef21-sgd", "ef21-w-sgd", "ef21-w-pp", "ef21-rare".
    smoothness : Smoothness
    alpha : float
        Contraction constant, in (0, 1].
    options
        What the formula wants besides: ``eta=`` (SGDM), ``zeta=`` (CLAG), ``participation=`` (PP), ``c=`` (rare features),
        ``p=`` (MARINA). ``mu=`` of ef21 and ef21-w: f has the Polyak-Lojasiewicz property with that constant.

    Raises
    ------
    OptionError
        When there is no such formula, an option is missing or out of its range, or the formula does not apply.
    """
    if rule not in _STEP_SIZES:
        why = _WITHOUT.get(rule, f"there are formulas for {', '.join(_STEP_SIZES)}")
        raise OptionError(f"theory: no step size for {briefly(rule)}: {why}")
    try:
        return _STEP_SIZES[rule](smoothness, _checked("alpha", alpha), **options)
    except TypeError as error:
        raise OptionError(f"theory: step size of {rule}: {str(error).partition(') ')[2] or error}") from None
