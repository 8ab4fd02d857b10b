"""What runs leave behind, put together: tables, pictures, a page."""

import json
import math
import re
import shutil
import sys

import numpy as np
import programs
import pytest
import virtual
from programs import PLANS, same_bits
from vectors_for_tests import gaussian

from mpi_ef.compress import lazy
from mpi_ef.jobs import figures
from mpi_ef.jobs.report import program as report
from mpi_ef.jobs.report.figures import training
from mpi_ef.jobs.reproduce import program as reproduce
from mpi_ef.jobs.reproduce.outcome import ReproduceConfig
from mpi_ef.jobs.train.config import PHASES, TrainConfig


@pytest.mark.parametrize("plan", PLANS)
def test_watched_exchanges_measure_what_is_lost_and_change_nothing(plan):
    d = 501

    def program(comm):
        watched, other = (PLANS[plan](comm, d, np.float64) for _ in range(2))
        watched.watched = True
        a, b = (gaussian(comm.Get_rank(), d, np.float64, step=step) for step in (0, 1))
        message, means = np.zeros(d), np.zeros((2, d))
        for p, mean in zip((watched, other), means, strict=True):
            p.exchange(lazy(a) - b).add_mean(mean)
        assert same_bits(*means)
        assert other.lost is None
        watched.add_own(message)
        expected = ((a - b - message) ** 2).sum() / ((a - b) ** 2).sum()
        np.testing.assert_allclose(watched.lost, expected, rtol=1e-12, atol=1e-30)
        assert (watched.lost > 0) == (plan not in ("dense", "gather identity"))
        watched.exchange(np.zeros(d))
        assert watched.lost == 0.0

    virtual.results(3, program)


def train(folder, **options):
    programs.trained(2, TrainConfig(model="mlp", steps=8, warmup=1, eval_every=4, log_every=2, out=folder, **options))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four trained runs, a reproduced experiment and a benchmark."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "sparse")
    train(folder / "dense", compressor="identity", placement="gradient")
    train(folder / "<odd>", compressor="sign", dense_steps=3)
    train(folder / "ef21", placement="gradient", rule="ef21", optimizer="sgd")
    config = ReproduceConfig(out=folder, steps=6)
    virtual.results(2, lambda comm: reproduce.run(comm, "speedup", config))
    unknown = dict.fromkeys(("entry_bits", "index_bits", "local_seconds", "touched_bytes"))
    row = {"name": "MPI_Allreduce", "kind": "dense", "median_seconds": 2.0, "min_seconds": 1.0, "max_seconds": 3.0,
           "sent_nbytes": 10, **unknown}
    bench = {"ranks": 2, "d": 5, "ratio": 0.1, "repeats": 3, "launches": 1, "mpi": "Some MPI",
             "link": {"latency_seconds": 1e-6, "bytes_per_second": 1e9}, "rows": [row]}
    (folder / "bench.json").write_text(json.dumps(bench))
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["sparse", "dense", "<odd>", "ef21"])
def test_metrics_say_what_is_lost_how_large_the_state_is_and_where_time_goes(runs, name):
    rows = rows_of(runs / name)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    state = {"sparse": ["e_i"], "dense": ["e_i"], "<odd>": ["e_i", "plan.residual"], "ef21": ["g_i", "g"]}[name]
    assert [key for key in rows[0] if key.startswith("norm_")] == [f"norm_{part}" for part in state]
    for row in rows:
        for phase in PHASES:
            assert 0 <= row[f"min_seconds_{phase}"] <= row[f"seconds_{phase}"] <= row[f"max_seconds_{phase}"]
        if name == "dense":
            assert row["lost"] == row["norm_e_i"] == 0
        elif name == "<odd>" and row["step"] <= 3:
            assert row["lost"] is None  # a dense step
        else:
            assert 0 < row["lost"] < 1
            assert all(row[f"norm_{part}"] > 0 for part in state)


@pytest.mark.slow
def test_table_pictures_and_page(runs, tmp_path, capsys):
    paths = [str(runs / name) for name in ("sparse", "<odd>", "dense", "ef21", "speedup", "bench.json")]
    report.main([*paths, "--plot", str(tmp_path / "new" / "all.png"), "--html", str(tmp_path / "page" / "all.html")])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == [
        "run",
        "dense",
        "sparse",
        "<odd>",
        "ef21",
    ]  # dense is the baseline
    assert "+0.0%" in lines[1]
    assert "EControl" in out
    assert "Some MPI" in out
    names = {"all-train.png", "all-speedup.png", "all-bench.png"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    assert all((tmp_path / "new" / name).read_bytes()[:4] == b"\x89PNG" for name in names)
    page = (tmp_path / "page" / "all.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)  # nothing is loaded from elsewhere
    assert "&lt;odd&gt;" in page
    assert "<odd>" not in page


def test_one_kind_of_runs_takes_the_name_as_it_is(runs, tmp_path):
    report.main([str(runs / "ef21"), "--plot", str(tmp_path / "one.svg")])
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_the_best_learning_rate_is_picked(runs, tmp_path, capsys):
    ended = {"ef14": {0.1: 2.3, 0.2: 2.1, 0.3: 2.2}, "ef21": {0.1: math.nan, 0.2: 2.5, 0.3: math.nan}}
    for rule, losses in ended.items():
        for lr, loss in losses.items():
            shutil.copytree(runs / "ef21", folder := tmp_path / f"{rule}-{lr}")
            summary = json.loads((folder / "summary.json").read_text())
            summary |= {"val_loss": loss, "config": summary["config"] | {"rule": rule, "lr": lr, "out": str(folder)}}
            (folder / "summary.json").write_text(json.dumps(summary))
    report.main([*map(str, sorted(tmp_path.iterdir())), "--best"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "ef14-0.2", "ef21-0.2"]


def test_runs_on_the_same_text_are_compared_wherever_it_lay(runs, tmp_path, capsys):
    """Each task of a sweep has a copy of its own; and another text under the same name is another one."""
    for name, content, place, loss in (("a", "x", "/tmp/1", 2.3), ("b", "x", "/tmp/2", 2.1), ("c", "y", "/tmp/2", 2.2)):
        shutil.copytree(runs / "ef21", folder := tmp_path / name)
        summary = json.loads((folder / "summary.json").read_text())
        changed = {"text": place, "data": content, "lr": loss, "out": str(folder)}
        summary |= {"val_loss": loss, "config": summary["config"] | changed}
        (folder / "summary.json").write_text(json.dumps(summary))
    report.main([*map(str, sorted(tmp_path.iterdir())), "--best"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "b", "c"]
    with pytest.raises(SystemExit, match="best has no effect here: none of these is a trained run"):
        report.main([str(runs / "bench.json"), "--best"])


def test_runs_of_the_same_name_are_told_apart(runs, tmp_path, capsys):
    train(tmp_path / "sparse")
    capsys.readouterr()
    report.main([str(runs / "sparse"), str(tmp_path / "sparse")])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        str(runs / "sparse"), str(tmp_path / "sparse")]


@pytest.mark.parametrize(("files", "arguments", "text"), [
    ({}, ["absent"], "absent: holds no finished run"),
    ({"run/summary.json": "{}", "run/metrics.jsonl": "{}"}, ["run"], "run: holds no finished run"),
    ({"run/table.txt": "", "run/metrics.jsonl": '{"step": 1}'}, ["run"], "run: metrics.jsonl is damaged"),
    ({"some.json": "[1, 2]"}, ["some.json"], "some.json: is no result of mpi-ef bench --json"),
    ({"some.json": "{"}, ["some.json"], "some.json: is no result of mpi-ef bench --json"),
])
def test_what_is_no_run(tmp_path, monkeypatch, files, arguments, text):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as caught:
        report.main(arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize(("option", "name", "text"), [
    ("--plot", "curves.xyz", "the picture cannot be written"), ("--html", "a file/page.html", "the page cannot be written"),
])
def test_what_cannot_be_written(runs, tmp_path, option, name, text):
    (tmp_path / "a file").write_text("")
    with pytest.raises(SystemExit, match=text):
        report.main([str(runs / "sparse"), option, str(tmp_path / name)])


def test_a_benchmark_alone(runs, tmp_path, capsys):
    report.main([str(runs / "bench.json"), "--plot", str(tmp_path / "bench.svg")])
    assert "Some MPI" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.svg"]


def test_what_is_lost_is_drawn_in_its_own_scale(runs, tmp_path, monkeypatch):
    """Runs that lose nothing say so; a thousandth is not drawn at the bottom of 0 ... 1."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    sparse, dense = rows_of(runs / "sparse"), rows_of(runs / "dense")
    little = [row | {"lost": row["lost"] and 1e-3 * row["lost"]} for row in sparse]
    for rows in (sparse, little, dense):
        training({"run": rows}, tmp_path / "x.png")
    panels = [(figure.axes[3], figure.axes[4]) for figure in drawn]
    assert [error.get_yscale() for error, _ in panels] == ["linear", "log", "log"]
    assert panels[0][0].get_ylim() == (0.0, 1.0)
    said = [[text.get_text() for panel in both for text in panel.texts] for both in panels]
    assert said == [[], [], ["nothing is compressed here"] * 2]
    for figure in drawn:
        figures.pyplot().close(figure)


def test_pictures_want_matplotlib(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="mpi-ef: a picture needs matplotlib, which is not installed; pip install"):
        report.main([str(runs / "sparse"), "--plot", str(tmp_path / "x.png")])
