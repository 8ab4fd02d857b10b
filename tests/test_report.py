"""What runs leave behind, put together: tables, pictures, a page."""

import json
import math
import os
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
from mpi_ef.jobs.bench import table
from mpi_ef.jobs.metrics import made_in
from mpi_ef.jobs.report import naming
from mpi_ef.jobs.report import program as report
from mpi_ef.jobs.report.figures import training
from mpi_ef.jobs.reproduce import figures as reproduced
from mpi_ef.jobs.reproduce import program as reproduce
from mpi_ef.jobs.reproduce.outcome import ReproduceConfig
from mpi_ef.jobs.reproduce.simulate import Curve
from mpi_ef.jobs.train import loop
from mpi_ef.jobs.train.config import PHASES, TrainConfig
from mpi_ef.jobs.train.suspects import suspicion_of


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


def test_ranks_that_were_left_out_are_named(tmp_path, capsys):
    """By the summary of the run, and by reports."""
    config = TrainConfig(model="mlp", steps=6, out=tmp_path, rule="byz-ef21", byzantine=1, placement="gradient", clip=0.0,
                         split="by-label")

    def program(comm):
        made = loop.Trainer(comm, config)
        state = made.optimizer.feedback.state
        state.suspects[:] = [0.0, 9.0, 1.0, 10.0]
        return suspicion_of(made.optimizer, comm)

    assert virtual.results(3, program) == [[0.0, 0.9, 0.1]] * 3
    programs.trained(3, config)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert len(found["suspicion"]) == 3
    (tmp_path / "summary.json").write_text(json.dumps(found | {"suspicion": [0.0, 0.9, 0.1]}))
    capsys.readouterr()
    report.main([str(tmp_path)])
    assert "left out were rank 1, 90 %" in capsys.readouterr().out
    (tmp_path / "summary.json").write_text(json.dumps(found | {"suspicion": ["x"]}))
    with pytest.raises(SystemExit, match="figures that are no numbers"):
        report.main([str(tmp_path)])


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
        assert 0.999 <= row["link_nbytes"] / row["sent_nbytes"] <= 1  # a rank is a node
        for phase in PHASES:
            assert 0 <= row[f"min_seconds_{phase}"] <= row[f"seconds_{phase}"] <= row[f"max_seconds_{phase}"]
        if name == "dense":
            assert row["lost"] == row["norm_e_i"] == 0
        elif name == "<odd>" and row["step"] <= 3:
            assert row["lost"] is None  # a dense step
        else:
            assert 0 < row["lost"] < 1
            assert all(row[f"norm_{part}"] > 0 for part in state)


def test_bytes_of_a_node_are_beside_those_of_a_rank_where_there_are_nodes(runs, tmp_path):
    def run_of(**said):
        summary = json.loads((runs / "sparse" / "summary.json").read_text())
        nodes, link = summary.pop("nodes"), summary.pop("link_nbytes")
        assert (nodes, link) == (2, summary["sent_nbytes"])
        return report._Run("run", summary | said, [], {})

    earlier, now = run_of(), run_of(nodes=2, link_nbytes=7_000_000)
    assert "node" not in report.table([earlier])
    heading, first, second = report.table([earlier, now]).splitlines()
    assert heading[: heading.index("node") + 4].split()[-2:] == ["sent/rank", "node"]
    assert [line[heading.index("node") - 3 :].split()[:2] for line in (first, second)][1] == ["7.0", "MB"]
    assert first.split()[5] == "-"


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
    assert re.search(r"<p>written \d{4}-\d\d-\d\d \d\d:\d\d UTC on \S+</p>", page)
    assert re.search(r"sparse: 2 ranks on \S+, finished \d{4}-\d\d-\d\d \d\d:\d\d UTC<br>", page)
    assert re.search(r'class="made">2 ranks on \S+, finished .* UTC</p>\n<pre>\|\|grad', page)
    assert re.search(r'class="made">2 ranks, file of .* UTC</p>\n<pre>Some MPI', page)  # written by an earlier version
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
    panels = [(figure.axes[3], figure.axes[4]) for figure in drawn]  # lost, norms
    assert [error.get_yscale() for error, _ in panels] == ["linear", "log", "log"]
    assert panels[0][0].get_ylim() == (0.0, 1.0)
    said = [[text.get_text() for panel in both for text in panel.texts] for both in panels]
    assert said == [[], [], ["nothing is compressed here"] * 2]
    for figure in drawn:
        figures.pyplot().close(figure)


@pytest.fixture
def drawn(monkeypatch):
    """Figures in place of files."""
    figures_drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: figures_drawn.append(figure))
    yield figures_drawn
    for figure in figures_drawn:
        figures.pyplot().close(figure)


def labels_of(axis):
    """The labels that are seen, and their places on the picture."""
    figure = axis.axes.figure
    figure.canvas.draw()
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for which in (axis.get_major_ticks(), axis.get_minor_ticks()) for tick in which
             if low <= tick.get_loc() <= high and tick.label1.get_text()]
    ticks.sort(key=lambda tick: tick.get_loc())
    return [tick.label1.get_text() for tick in ticks], [tick.label1.get_window_extent() for tick in ticks]


EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.parametrize(("low", "high"), [
    (2e5, 4.3e6), (1.0, 1e12), (2.4e9, 2.6e9),
    *(pytest.param(*ends, marks=EXHAUSTIVE)
      for ends in ((2.5e6, 2.6e9), (3.2e8, 2.6e9), (1.0, 1.0), (900.0, 1.2e5), (1.2e5, 7e5))),
])
def test_labels_of_bytes_do_not_touch(drawn, low, high):
    """They were "2 x 10^5 3 x 10^5 4 x 10^5" on top of each other."""
    rows = [{"step": n, "sent_nbytes": sent, "val_loss": 1.0 / n, "loss": 1.0} for n, sent in enumerate((low, high), 1)]
    training({"run": [row | {"seconds": 1.0} for row in rows]}, "", ("bytes", "time", "steps"))
    texts, boxes = labels_of(drawn[-1].axes[0].xaxis)
    assert all(re.fullmatch(r"\S+ [kMGT]?B", text) for text in texts)
    assert len(texts) >= (2 if high > low else 1)
    assert len(set(texts)) == len(texts)
    assert all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(("value", "text"), [
    (0, "0 B"), (999, "999 B"), (2e5, "200 kB"), (2.5e6, "2.5 MB"), (1e9, "1 GB"), (3e15, "3000 TB"),
])
def test_ticks_in_bytes(value, text):
    assert figures.bytes_text(value) == text


def test_bars_begin_at_zero_and_say_what_they_are(runs, drawn):
    training({name: rows_of(runs / name) for name in ("sparse", "dense")}, "", ["phases"])
    (panel,) = drawn[0].axes
    assert panel.get_xscale() == "linear"
    assert panel.get_xlim()[0] == 0.0
    means = [1e3 * rows_of(runs / name)[-1][f"seconds_{phase}"] / 8 for name in ("sparse", "dense") for phase in PHASES]
    texts = [text.get_text() for text in panel.texts]
    assert "e" not in "".join(texts)  # 216 was "2.2e+02"
    assert [float(text) for text in texts] == pytest.approx(means, rel=0.05)
    assert max(panel.get_xlim()) > max(means)


def test_times_below_a_second_are_drawn_where_they_are(drawn):
    rows = [{"step": n, "seconds": 0.25 * n, "val_loss": 1.0, "sent_nbytes": 0} for n in (1, 2)]
    training({"run": rows}, "", ["time", "bytes"])
    assert [list(panel.lines[0].get_xdata()) for panel in drawn[0].axes] == [[0.25, 0.5], [1, 1]]


def test_one_panel_and_no_such_panel(runs, tmp_path, drawn):
    report.main([str(runs / "sparse"), "--panels", "bytes, lost", "--plot", "x.png"])
    assert [panel.get_xlabel() for panel in drawn[0].axes] == ["sent per rank", "steps"]
    with pytest.raises(SystemExit, match="report: panels=byte is unknown; did you mean bytes?"):
        report.main([str(runs / "sparse"), "--panels", "byte"])


@pytest.mark.parametrize("panels", [["bytes"], ["bytes", "steps"]])
def test_the_legend_is_below_the_panels(runs, drawn, panels):
    """In a picture of one panel it lay on the curves."""
    training({"sparse": rows_of(runs / "sparse")}, "", panels)
    (figure,) = drawn
    assert len(figure.legends) == 1
    assert [axes.get_legend() for axes in figure.axes] == [None] * len(panels)


def test_legends_name_methods(runs, tmp_path, drawn, capsys):
    """And of the same methods options that differ, or at last the names of folders."""
    for name in ("dense", "again"):
        shutil.copytree(runs / "dense", tmp_path / name)
    summary = json.loads((tmp_path / "again/summary.json").read_text())
    summary["config"]["lr"] = 0.5
    shutil.copytree(tmp_path / "again", tmp_path / "twice")
    for name in ("again", "twice"):
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    paths = [tmp_path / "dense", tmp_path / "again", tmp_path / "twice", runs / "sparse", runs / "<odd>", runs / "ef21"]
    report.main([*map(str, paths), "--plot", "x.png"])
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "adamw, dense, lr=0.006", "adamw, dense, lr=0.5 (again)", "adamw, dense, lr=0.5 (twice)",
        "adamw, TopK(0.01, values=Quantize('bf16'))", "adamw, Sign(1024)", "sgd, TopK(0.01, values=Quantize('bf16'))"]
    assert [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "method", *["adamw, dense"] * 3, "adamw, TopK(0.01, values=Quantize('bf16'))", "adamw, Sign(1024)",
        "sgd, TopK(0.01, values=Quantize('bf16'))"]


def test_the_code_of_a_run_is_in_its_name():
    """As --code takes it; and whole where the rest is cut."""
    runs = [{"config": {"optimizer": "sgd", "compressor": "identity", "code": code}}
            for code in ("none", "fr:1", "cyclic:1", "FractionalRepetition(1)", "SRSGC(1, 2, 2)")]
    names = ["sgd, dense", "sgd, dense, fr:1", "sgd, dense, cyclic:1", "sgd, dense, fr:1", "sgd, dense, srsgc:1,2,2"]
    assert [naming.method(run) for run in runs] == names
    assert naming.methods(runs[:3], ["a", "b", "c"]) == names[:3]
    runs[1]["config"]["compressor"] = "x" * 80
    assert naming.method(runs[1]).endswith("xx, fr:1")
    assert len(naming.method(runs[1])) == 60


def test_legends_of_what_an_earlier_version_has_written():
    assert naming.method({"config": {"optimizer": "adamw", "compressor": "topk"}}) == "adamw, topk"
    for learned, name in (("none", "sgd, topk"), (None, "sgd, topk"), ("window", "sgd under window, topk")):
        assert naming.method({"config": {"optimizer": "sgd", "precondition": learned, "compressor": "topk"}}) == name
    assert naming.method({"config": {"compressor": "identity"}, "optimizer": "x"}) == "dense"
    assert naming.method({"config": {"compressor": "identity", "code": "none"}}) == "dense"
    one, other = ({"ranks": n, "config": {"compressor": "Mine(3)", "out": str(n)}} for n in (2, 4))
    assert naming.methods([one, other], ["a", "b"]) == ["Mine(3), ranks=2", "Mine(3), ranks=4"]
    devices = ({}, {"device": "auto"}, {"device": "cuda"})
    one, other, third = ({"config": {"compressor": "Mine(3)", **device}} for device in devices)
    assert naming.methods([one, other], ["a", "b"]) == ["Mine(3) (a)", "Mine(3) (b)"]
    assert naming.methods([one, third], ["a", "b"]) == ["Mine(3), device=auto", "Mine(3), device=cuda"]


@pytest.mark.parametrize(("count", "means"), [
    (1, [4, 0, 2, 6, 1]), (3, [4, 2, 8 / 3, 3, 3.5]), (5, [4, 2, 13 / 5, 9 / 4, 3]),
])
def test_running_means(count, means):
    np.testing.assert_allclose(figures.running_mean([4.0, 0.0, 2.0, 6.0, 1.0], count), means)
    assert math.isnan(figures.running_mean([1.0, math.inf, 1.0], 3)[1])


def test_noisy_curves_are_drawn_as_running_means(drawn):
    """Three of them covered each other. Smooth ones, short ones and those that diverge stay as they are."""
    steps = list(range(400))
    noise = np.random.default_rng(0).lognormal(0.0, 2.0, 400).tolist()
    curves = {"noisy": noise, "smooth": [10.0 ** (-0.1 * step) for step in steps], "zero": [0.0] * 400,
              "far": [10.0 ** min(step, 30) for step in steps]}
    reproduced.against("steps")({"panel": {name: Curve(steps, values, steps, steps) for name, values in curves.items()}}, "")
    (panel,) = drawn[0].axes
    assert len(panel.lines) == 5
    assert list(panel.lines[0].get_ydata()) == noise
    assert list(panel.lines[1].get_ydata()) == figures.running_mean(noise, 10)
    assert panel.get_ylabel() == "||grad f(x)||^2, running mean"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == list(curves)


def test_the_benchmark_has_plain_labels(runs, drawn):
    table.plot(json.loads((runs / "bench.json").read_text()), "")
    here, elsewhere = drawn[0].axes
    for axis in (here.xaxis, elsewhere.xaxis):
        labels = [axis.get_major_formatter()(place) for place in axis.get_ticklocs()]
        assert labels
        assert all(re.fullmatch(r"[\d.]+(e[+-]\d+)?", text) for text in labels)


@pytest.mark.parametrize(("document", "text"), [
    ({"ranks": 2, "hosts": ["b", "a"], "finished": "2031-02-03T04:05:06+01:00"},
     "2 ranks on b, a, finished 2031-02-03 03:05 UTC"),
    ({"ranks": 1, "hosts": list("abcde")}, "1 rank on a, b, c and 2 more hosts, file of 2001-09-09 01:46 UTC"),
    ({"ranks": "x", "hosts": [1], "finished": 7}, "file of 2001-09-09 01:46 UTC"),
    ({"ranks": 10**400, "hosts": "a", "finished": "soon"}, "file of 2001-09-09 01:46 UTC"),
    ({"hosts": ["\x1b[31m" + 100 * "a"]}, "on \\x1b[31m" + 52 * "a" + ", file of 2001-09-09 01:46 UTC"),
    ([], "file of 2001-09-09 01:46 UTC"),
])
def test_when_and_where_a_run_was_made(tmp_path, document, text):
    path = tmp_path / "file"
    path.touch()
    os.utime(path, (10**9, 10**9))
    assert made_in(document, path) == text


def test_pictures_want_matplotlib(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="mpi-ef: a picture needs matplotlib, which is not installed; pip install"):
        report.main([str(runs / "sparse"), "--plot", str(tmp_path / "x.png")])
