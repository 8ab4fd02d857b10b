"""Training on 4 ranks that is killed again and again, at any moment, and ends with the bits of one that nobody disturbed.

``make torture`` sets MPI_EF_TORTURE_KILLS, and counts what happened. In the gate: test_interruption.py.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress

import pytest
from launching import finish, run, start
from test_interruption import GPT, MLP, arguments, comes_true, losses, ranks_of, summary

RANKS, LIMIT = 4, 240
KILLS = int(os.environ.get("MPI_EF_TORTURE_KILLS", "3"))  # of each of the trainings below
STEPS = 200 + 50 * KILLS
TRAININGS = {
    "topk of adamw": [*GPT, "--optimizer", "adamw"],
    "1-bit adam, saved in the background": [*MLP, "--optimizer", "onebit-adam", "--freeze", 60, "--save-in-background"],
    "econtrol": [*MLP, "--optimizer", "sgd", "--placement", "gradient", "--rule", "econtrol", "--lr", 0.1],
}


def command(out, options):
    """Later options count: all are those of the interruption test but for the length and the number of checkpoints."""
    return arguments(out, *options, "--steps", STEPS, "--checkpoint-every", 4, "--eval-every", STEPS, "--resume", "exact",
                     "--keep", 2)


def strike(process, out, rng):
    """Kill one rank or all, at a moment that the dice tell; return what was hit, None when the run was over before."""
    moment = rng.choice(["starting", "running", "saving", "saving", "saving"])
    folder = out / "checkpoints"
    newest = max((path.name for path in folder.glob("step-*")), default="")

    def saves():
        return any(path.name > newest for path in folder.glob("step-*"))

    if not comes_true(lambda: len(ranks_of(out)) == RANKS, process):
        return None
    if moment == "starting":
        until = time.monotonic() + rng.uniform(0.0, 4.0)
        comes_true(lambda: time.monotonic() > until or saves(), process)
    else:
        if not comes_true(saves, process):
            return None
        time.sleep(rng.uniform(0.0, 0.3))
        if moment == "saving":
            while process.poll() is None and not list(folder.glob(".tmp-step-*")):
                pass
            time.sleep(rng.uniform(0.0, 0.008))
    victims = ranks_of(out)
    whom = rng.choice(["all", "one"])
    for pid in victims if whom == "all" else rng.sample(victims, min(1, len(victims))):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return whom if victims else None


@pytest.mark.exhaustive
@pytest.mark.timeout(120 + 120 * KILLS)
@pytest.mark.parametrize("name", TRAININGS)
def test_killed_again_and_again(name, tmp_path):
    options, hit, rng = TRAININGS[name], Counter(), random.Random(name)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    ended = run(RANKS, *command(whole, options), within=LIMIT)
    assert ended.status == 0, ended.text
    while True:
        left = set(out.glob("checkpoints/.tmp-step-*"))
        process = start(RANKS, *command(out, options))
        whom = strike(process, out, rng) if hit["kills"] < KILLS else None
        ended = finish(process, within=LIMIT)
        if whom is not None and ended.status != 0:
            hit.update(["kills", f"kills of {whom}"])
            hit["inside a save"] += not left.issuperset(out.glob("checkpoints/.tmp-step-*"))
        elif ended.status == 0:
            break
        else:
            raise AssertionError(ended.text)
    print(f"{name}: {json.dumps(hit)}")
    assert hit["kills"] == KILLS, "it was over too soon"
    assert hit["inside a save"] >= KILLS // 4
    assert summary(out)["parameters_crc32"] == summary(whole)["parameters_crc32"]
    assert summary(out)["replicas_equal"]
    assert losses(out) == losses(whole)
    assert not list(out.glob("checkpoints/step-*/BAD"))
