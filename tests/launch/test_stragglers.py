"""Coded gradients on real ranks, of which some sleep, are stopped, go on, or are killed."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from launching import MPIEXEC, finish, run, start
from patience import limit

PROGRAM, MANY = (Path(__file__).with_name(name) for name in ("coded_program.py", "many_program.py"))
LIMIT = 100


def told_by(ended):
    return {one["rank"]: one for one in map(json.loads, re.findall(r"\{[^{}]*\}", ended.text))}


def trained(n=4, **options):
    """Return what each rank that came to its end has printed, and what else there was."""
    ended = run(n, PROGRAM, json.dumps({"patience": limit(20)} | options), within=LIMIT)
    assert ended.status == 0, ended.text
    return told_by(ended), ended


@pytest.mark.parametrize("orders", [0, 5], ids=["whole orders", "compressed orders"])
def test_a_worker_that_is_stopped_and_goes_on_and_one_that_sleeps_change_no_bit(orders):
    """Twins are 0 and 2, 1 and 3: one of each is always awake. Rank 2 finds one old order, and no more."""
    told, _ = trained(steps=40, stopped=[[2, 5, 25]], sleepers=[3], sleep=0.2, orders=orders)
    assert sorted(told) == [0, 1, 2, 3]
    assert told[0]["same"]
    assert len({one["x"] for one in told.values()}) == 1
    assert told[2]["computed"] <= 40 - 20 + 1
    assert told[0]["left"] == []


def test_a_worker_that_is_stopped_for_good_keeps_nobody_from_the_end():
    """Compressed differences: what the server knows of each worker is what that has told; a line names who is missing."""
    told, ended = trained(steps=60, k=5, part=0.001, stopped=[[2, 20, None]], patience=limit(3), status=0)
    assert sorted(told) == [0, 1, 3]
    assert told[0]["left"] == [2]
    assert len({one["x"] for one in told.values()}) == 1
    assert all(told[0]["rows"][rank] == told[rank]["h"] for rank in told)
    assert told[1]["sent"] < 1200 + told[1]["computed"] * 68 * 8 / 4  # the first answer is whole, and so is the last word
    assert len(ended.lines_with("rank 2 on ")) == 1


def test_too_many_silent_ranks_end_the_run_with_a_line_and_what_was_computed(tmp_path):
    saved = tmp_path / "x.npy"
    ended = run(4, PROGRAM, json.dumps({"stopped": [[1, 5, None], [3, 5, None]], "patience": limit(2), "out": str(saved)}),
                within=LIMIT)
    assert ended.status not in (0, None), ended.text
    (line,) = ended.lines_with("caught: CodedGradients: ") or pytest.fail(ended.text)
    assert re.search(r"rank 1 on \S+, rank 3 on \S+ silent for [\d.]+ s, at step \d+; 1 of each 2 twins needed", line), line
    assert np.load(saved).any()


@pytest.mark.parametrize(("scheme", "go"), [("srsgc:1,2,2", 25)])
def test_many_trainings_do_not_wait_for_a_worker_that_is_stopped(scheme, go):
    """It has computed one step of each model in that time, at most; each training is as by itself."""
    ended = run(4, MANY, scheme, "40", "2", "5", str(go), str(limit(20)), within=LIMIT)
    assert ended.status == 0, ended.text
    told = told_by(ended)
    assert sorted(told) == [0, 1, 2, 3]
    assert len({one["x"] for one in told.values()}) == 1
    assert told[0]["error"] < 1e-12
    assert told[0]["late"] >= 1
    assert told[0]["missing"] == []
    assert told[2]["computed"] <= 2 * (40 - (go - 5)) + 2


MAP = """
import json, os, signal, sys
import numpy as np
from mpi4py.MPI import COMM_WORLD as comm
from mpi_ef.coded import CodedMap, leave

options, calls = json.loads(sys.argv[1]), []

def f(x):
    calls.append(0)
    if comm.rank in options["stopped"] and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return np.tanh(x) + (comm.rank == options["wrong"]) * np.random.default_rng(len(calls)).standard_normal(x.shape)

x = np.linspace(-1, 1, 8 * 500).reshape(8, 500)
with CodedMap(comm, f, 8, (500,), np.float64, evaluations=40, patience_seconds=options["patience"], wrong=5,
              sample=x[:, ::4]) as coded:
    for again in range(2 if comm.rank == 0 else 0):
        out = coded.map(x)
        print(json.dumps({"missing": out.missing, "wrong": out.wrong_ranks,
                          "error": float(np.abs(out.values - np.tanh(x)).max())}), flush=True)
print(f"rank {comm.rank} is here", flush=True)
leave(options["status"])
"""


def test_a_map_goes_on_without_a_rank_that_is_stopped(tmp_path):
    """Rank 2 of 9 is stopped in its second evaluation, rank 5 computes wrongly: five of the 40 evaluations each."""
    script = tmp_path / "program.py"
    script.write_text(MAP, encoding="utf-8")
    ended = run(9, script, json.dumps({"stopped": [2], "wrong": 5, "patience": limit(3), "status": 0}), within=LIMIT)
    assert ended.status == 0, ended.text
    first, second = (json.loads(line) for line in ended.text.splitlines() if line.startswith("{"))
    assert first["missing"] == [9, 17, 25, 33]
    assert second["missing"] == [1, 9, 17, 25, 33]
    for told in (first, second):
        assert told["wrong"] == [5]
        assert told["error"] < 0.05
    assert len(ended.lines_with("is here")) == 8, ended.text


@pytest.mark.parametrize(("ending", "line"), [
    ("none", r"worker 1: the server, rank 0, has gone without close\(\); call it when its work is done"),
    ("exit", "mpi-ef: rank 0, the server, has left its workers after an error; all processes are ended"),
], ids=["none", "exit"])
def test_a_server_that_leaves_its_workers_keeps_nobody_waiting(ending, line):
    """Workers waited for ever for the next order of a server that waited for them in MPI_Finalize; or nothing was said."""
    ended = run(2, PROGRAM, json.dumps({"steps": 3, "ending": ending, "patience": limit(20)}), within=LIMIT)
    assert ended.status not in (0, None), ended.text
    assert re.search(line, ended.text), ended.text


FREED = """
import numpy as np
from mpi4py.MPI import COMM_WORLD as comm
from mpi_ef.coded import coded_map, leave

part = comm.Split(comm.rank % 2)
for again in range(3):
    out = coded_map(part, np.tanh, np.ones((2, 5)) if part.rank == 0 else None)
part.Free()
leave(0)
print(f"rank {comm.rank} is here", flush=True)
"""


def test_a_communicator_may_be_freed_after_a_map(tmp_path):
    """What its ranks say to each other at their end, they say before."""
    script = tmp_path / "program.py"
    script.write_text(FREED, encoding="utf-8")
    ended = run(4, script, within=LIMIT)
    assert ended.status == 0, ended.text
    assert len(ended.lines_with("is here")) == 4, ended.text


# Launchers end the other ranks when one dies, unless they are told not to; MPICH's does where a signal was the cause.
OUTLIVING = {"Open MPI": ["--with-ft", "ulfm", "--mca", "coll", "^han", "--mca", "mpi_preconnect_mpi", "1"],
             "MPICH": ["-disable-auto-cleanup"]}


def library():
    text = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, check=False).stdout
    return "MPICH" if "HYDRA" in text else "Open MPI"


def outliving(options):
    name = library()
    command = ["sh", "-c", 'trap "" USR1 TERM; "$@" || exit 0', "sh"] if name == "MPICH" else []
    process = start(4, PROGRAM, json.dumps(options), launcher=OUTLIVING[name], before=command, real=True)
    return finish(process, within=LIMIT)


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_twenty_of_twenty():
    """Stopped and resumed at random steps, asleep at random, killed: the same bits, and everybody ends."""
    rng = np.random.default_rng(0)
    for again in range(20):
        stop = int(rng.integers(1, 25))
        told, _ = trained(steps=60, stopped=[[2, stop, stop + int(rng.integers(5, 30))]], sleepers=[1, 3], seed=again,
                          orders=5 * (again % 2))
        assert told[0]["same"]
        assert sorted(told) == [0, 1, 2, 3]
        told, _ = trained(steps=60, stopped=[[1, stop, None]], patience=3, status=0)
        assert told[0]["same"]
        assert told[0]["left"] == [1]
        ended = outliving({"steps": 60, "killed": [[2, stop]], "patience": 3, "status": 0})
        told = told_by(ended)
        assert told[0]["same"], ended.text
        assert told[0]["left"] == [2]
        assert sorted(told) == [0, 1, 3]
        print(again, stop, "as undisturbed", flush=True)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_steps_are_short_though_workers_sleep():
    """Acceptance: p95 of the step at most 1/2.5 of uncoded; and a stopped worker costs at most half a step."""
    ratios = []
    for seed in range(3):
        coded, plain = (trained(steps=200, code=code, sleepers=[1, 2, 3], seed=seed)[0][0] for code in ("fr:1", "fr:0"))
        ratios.append(plain["p95"] / coded["p95"])
    quiet = trained(steps=100)[0][0]["p50"]
    stopped = trained(steps=100, stopped=[[2, 0, None]], patience=3, status=0)[0][0]["p50"]
    print("p95 uncoded / coded", ratios, "step with a stopped worker / without", stopped / quiet)
    assert np.median(ratios) >= 2.5
    assert stopped <= 1.5 * quiet



@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_reproduce_stops_a_rank_and_lets_it_go_on(tmp_path):
    """On five ranks, of which four take the times; with the numbers that are demanded where they are not of time."""
    ended = run(5, "-m", "mpi_ef.jobs.cli", "reproduce", "gradient-coding", "--out", str(tmp_path), within=250)
    assert ended.status == 0, ended.text
    table = (tmp_path / "gradient-coding" / "table.txt").read_text()
    assert "repetition s=1, rank 3 stopped" in table
    assert re.search(r"uncoded, rank 3 stopped +CodedGradients: rank 3 on \S+ silent for 2 s at step 5", table)
    assert not re.search(r"(gradient|grad f|a_i).* MISSED", table)


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_reproduce_times_many_trainings_on_real_ranks(tmp_path):
    """On five ranks, of which four take the times; all models are those of trainings by themselves."""
    ended = run(5, "-m", "mpi_ef.jobs.cli", "reproduce", "sequential", "--steps", "8", "--out", str(tmp_path), within=250)
    assert ended.status == 0, ended.text
    rows = [json.loads(line) for line in (tmp_path / "sequential" / "metrics.jsonl").read_text().splitlines()]
    timed = [row for row in rows if row["panel"].startswith("real ranks")]
    assert len(timed) == 3 * 6
    assert all(row["error"] < 1e-12 and row["seconds"] > 0 for row in timed)
