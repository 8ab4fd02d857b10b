"""Options as fields: what constructors take, what values are allowed, and what of it is kept."""

import inspect
from dataclasses import InitVar

import pytest

from mpi_ef.errors import OptionError
from mpi_ef.ranges import checked, option, with_options


@with_options
class Ball:
    kind: str = "round"
    lr: InitVar[float] = 0.1
    most: float = option(10.0, "(0, inf)", "10 is usual")
    least: float = option(0.5, "(0, {most}]", "0.5 is usual")
    bounces: int = option(3, 1, "3 is usual")
    stops: int | None = option(None, 1, "it needs a bounce")

    def __post_init__(self, lr):
        self.doubled = 2 * lr


@with_options
class Balloon(Ball):
    lr: InitVar[float] = 0.3
    air: bool = True


def test_what_is_kept_are_the_facts():
    ball = Balloon(lr=0.2, stops=4)
    assert ball.doubled == 0.4
    assert Balloon().doubled == 0.6
    assert checked(ball) == {"kind": "round", "most": 10.0, "least": 0.5, "bounces": 3, "stops": 4, "air": True}
    assert not hasattr(ball, "lr")  # a default would be taken for the value
    taken = inspect.signature(Balloon).parameters
    assert (taken["lr"].default, taken["lr"].annotation, taken["most"].default) == (0.3, float, 10.0)
    assert ball != Balloon(lr=0.2, stops=4)
    assert len({ball, ball}) == 1


@pytest.mark.parametrize(("options", "words"), [
    ({"most": 0.0}, r"Ball: most=0.0 is not in \(0, inf\); 10 is usual"),
    ({"least": 11}, r"Ball: least=11 is not in \(0, 10.0\]; 0.5 is usual"),
    ({"least": 2.5, "most": 2}, r"least=2.5 is not in \(0, 2\]"), ({"least": None}, "least=None is not in"),
    ({"bounces": 0}, "Ball: bounces=0 is not a positive integer; 3 is usual"),
    ({"bounces": None}, "bounces=None is not a positive integer"), ({"stops": 0}, "stops=0 is not a positive integer"),
])
def test_what_is_not_allowed_is_said(options, words):
    with pytest.raises(OptionError, match=words):
        checked(Ball(**options))
