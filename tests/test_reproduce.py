"""mpi-ef reproduce: the same numbers on any number of ranks, files where they belong, one line for what is wrong."""

import json
import lzma
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import virtual
from test_runs import somebody_in

from mpi_ef.coded import Cyclic, FractionalRepetition
from mpi_ef.compress import TopK
from mpi_ef.errors import DataError, DisagreementError
from mpi_ef.jobs import figures
from mpi_ef.jobs.reproduce import experiments, gradient_coding, second_order
from mpi_ef.jobs.reproduce import program as reproduce
from mpi_ef.jobs.reproduce.libsvm import content_of, load_libsvm
from mpi_ef.jobs.reproduce.outcome import ReproduceConfig
from mpi_ef.jobs.reproduce.problems import zeta_quadratics
from mpi_ef.jobs.reproduce.program import EXPERIMENTS
from mpi_ef.jobs.reproduce.simulate import Curve, descend


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "ef21-rare"))
                                  for name, experiment in EXPERIMENTS.items()
                                  if "data" not in experiment.takes and name not in {"mkor", "monna"}])
# mkor trains on the ranks it has, monna is in test_attacks.py
def test_experiments_do_not_depend_on_the_number_of_ranks(name, tmp_path):
    seen = []
    for n in (1, 3):
        config = ReproduceConfig(out=tmp_path / str(n), steps=5)
        virtual.results(n, lambda comm, config=config: reproduce.run(comm, name, config))
        folder = tmp_path / str(n) / name
        seen.append(((folder / "metrics.jsonl").read_text(), (folder / "table.txt").read_text()))
        assert (folder / f"{name}.png").read_bytes()[1:4] == b"PNG"
        rows = [json.loads(line) for line in seen[0][0].splitlines()]
        assert rows
        assert all(np.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert seen[0] == seen[1]


def test_gradient_coding_is_the_same_on_any_number_of_ranks(tmp_path, monkeypatch):
    """Without phishing, of made data; times are of real ranks, and a line says how to get them."""
    monkeypatch.setattr(gradient_coding, "_SIZES", ((6, 1), (10, 3)))
    monkeypatch.setattr(gradient_coding, "_DECODED", ((FractionalRepetition(1), 6), (Cyclic(3), 6)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    seen = []
    for n in (1, 3):
        config = ReproduceConfig(out=tmp_path / str(n), steps=25)
        virtual.results(n, lambda comm, config=config: reproduce.run(comm, "gradient-coding", config), virtual=True)
        folder = tmp_path / str(n) / "gradient-coding"
        seen.append(((folder / "metrics.jsonl").read_text(), (folder / "table.txt").read_text()))
        assert (folder / "gradient-coding.png").read_bytes()[1:4] == b"PNG"
    assert seen[0] == seen[1]
    rows = [json.loads(line) for line in seen[0][0].splitlines()]
    assert all(np.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    repetition, cyclic = (row for row in rows if row["panel"] == "sums")
    assert repetition["different"] == 1
    assert max(repetition["relative"], cyclic["relative"]) <= 1e-12
    assert {row["run"] for row in rows if row["panel"] == "a worker dies"} == {
        run.name for run in gradient_coding.RUNS if not run.late}
    assert "data: made, no phishing in ../shared/data" in seen[0][1]
    assert "mpiexec -n 4 mpi-ef reproduce gradient-coding" in seen[0][1]


def test_gradient_coding_wants_the_data_that_it_was_told_of(tmp_path):
    config = ReproduceConfig(data=tmp_path, out=tmp_path)
    for error in virtual.run(2, lambda comm: reproduce.run(comm, "gradient-coding", config), virtual=True):
        assert isinstance(error, DataError)
        assert f"{tmp_path} has no file phishing" in str(error)


def test_mkor_trains_and_says_what_is_reached(tmp_path, monkeypatch):
    """A short training, and the table as of made-up numbers for the others."""
    made = {"val_loss": 2.0, "loss": 1.5, "sent_nbytes": 1000, "dense_nbytes": 9000, "statistics_nbytes": 10,
                     "seconds_per_step": 0.01, "replicas_equal": True, "factors_equal": True,
                     "path": [(1, 3.0, 0), (2, 1.5, 1000)]}

    def train(comm, chosen, out):
        real = chosen["seed"] == 0 and (chosen.get("model"), chosen.get("precondition")) == ("mlp", "window")
        return second_order.train(comm, chosen, out) if real else dict(made)

    monkeypatch.setattr(second_order, "train", second_order._train, raising=False)
    monkeypatch.setattr(second_order, "_train", train)
    monkeypatch.setattr(second_order, "_TIMED", 7)
    config = ReproduceConfig(out=tmp_path, steps=2)
    virtual.results(2, lambda comm: reproduce.run(comm, "mkor", config))
    table = (tmp_path / "mkor" / "table.txt").read_text()
    assert "MISSED" in table
    assert "reached" in table
    assert (tmp_path / "mkor" / "mkor.png").read_bytes()[1:4] == b"PNG"
    rows = [json.loads(line) for line in (tmp_path / "mkor" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "parameters" in row]
    assert trained
    assert all(row["statistics_nbytes"] > 0 and np.isfinite(row["val_loss"]) for row in trained)


NAMES = ("phishing", "mushrooms", "a9a", "w8a")
ENDINGS = ("", ".libsvm", ".txt", ".xz")


@pytest.fixture
def small_data(tmp_path):
    """Sets of the names of real ones, of 45 rows with 12 features, under names that they have where people keep them."""
    for name, ending in zip(NAMES, ENDINGS, strict=True):
        rng = np.random.default_rng(len(name))
        text = "".join(
            f"{int(label)} " + " ".join(f"{column + 1}:{rng.normal():.3f}" for column in range(12)) + "\n"
            for label in rng.integers(0, 2, 45)
        )
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(lzma.compress(text.encode()) if ending == ".xz" else text.encode())
    return tmp_path


@pytest.mark.parametrize(("name", "words", "rows"), [
    ("ef21", NAMES, 16), ("ef21-pp", ["100.0%", "50.0%", "25.0%", "12.5%"], 4),
    ("ef21-bc", ["Top-2 down", "Top-4 down", "Top-8 down", "all down"], 5),
])
def test_experiments_on_small_data(small_data, name, words, rows, monkeypatch):
    """As test_experiments_on_data, of all that want data: the same on any number of ranks."""
    monkeypatch.setattr(figures, "save", lambda figure, path: path.write_text("drawn"))
    seen = []
    for n in (1, 3):
        config = ReproduceConfig(data=small_data, out=small_data / str(n), steps=5)
        virtual.results(n, lambda comm, config=config: reproduce.run(comm, name, config))
        folder = small_data / str(n) / name
        assert (folder / f"{name}.png").read_text() == "drawn"
        seen.append(((folder / "metrics.jsonl").read_text(), (folder / "table.txt").read_text()))
    assert seen[0] == seen[1]
    assert all(word in seen[0][1] for word in words)
    assert len(seen[0][1].splitlines()) == 1 + rows


OWN = "econtrol(eta=0.03) TopK(0.1); my_rule:FADING(fade=0.5) my_compressor:BlockMax(4)"


@pytest.mark.parametrize("name", ["econtrol", "counterexample", "ef21", "speedup"])
def test_methods_are_others_where_an_experiment_compares_methods(name, small_data, monkeypatch):
    """A method of the experiment gives the same curve as when it is asked for; one from outside takes part."""
    monkeypatch.setattr(figures, "save", lambda figure, path: path.write_text("drawn"))
    seen = []
    for methods in (None, OWN):
        config = ReproduceConfig(data=small_data if name == "ef21" else None, out=small_data / str(methods is None), steps=5,
                                 methods=methods)
        virtual.results(2, lambda comm, config=config: reproduce.run(comm, name, config))
        folder = small_data / str(methods is None) / name
        seen.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        assert json.loads((folder / "summary.json").read_text()).get("methods") == methods
    assert {row["run"] for row in seen[1]} == {text.strip() for text in OWN.split(";")}
    assert all(text.strip() in (folder / "table.txt").read_text() for text in OWN.split(";"))
    if name == "econtrol":  # of the others TopK or the strength are others
        first, second = ([row for row in rows if row.pop("run") == run]
                         for rows, run in zip(seen, ("EControl", "econtrol(eta=0.03) TopK(0.1)"), strict=True))
        assert first == second


@pytest.fixture
def experiment(monkeypatch):
    """An experiment that is over at once."""
    outcome = experiments.Outcome([{"step": 1}], "the table", lambda path: figures.pyplot() and path.write_text(""))
    monkeypatch.setattr(reproduce.Experiment, "run", lambda *_: outcome)


def test_without_matplotlib_the_numbers_are_there(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    virtual.results(2, lambda comm: reproduce.run(comm, "ef21", ReproduceConfig(out=tmp_path)))
    assert (tmp_path / "ef21" / "table.txt").read_text() == "the table\n"
    assert not (tmp_path / "ef21" / "ef21.png").exists()
    assert "no picture: a picture needs matplotlib, which is not installed; pip" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    error, _ = virtual.run(2, lambda comm: reproduce.run(comm, "ef21", ReproduceConfig(out=tmp_path / "file")))
    assert isinstance(error, DataError)
    assert "file/ef21" in str(error)
    assert "Not a directory" in str(error)
    assert str(error).endswith(" another --out")


@pytest.mark.exhaustive  # what these compute is looked at in test_papers.py, how they run above
def test_experiments_on_data(tmp_path, shared_data):
    config = ReproduceConfig(data=shared_data, out=tmp_path, steps=5)
    virtual.results(2, lambda comm: reproduce.run(comm, "ef21", config))
    table = (tmp_path / "ef21" / "table.txt").read_text()
    assert all(name in table for name in ("phishing", "mushrooms", "a9a", "w8a", "ef21-plus", "gd"))


def test_missing_data_is_told_once_with_where_to_get_it(tmp_path):
    config = ReproduceConfig(data=tmp_path, out=tmp_path)
    for outcome in virtual.run(2, lambda comm: reproduce.run(comm, "ef21", config)):
        assert isinstance(outcome, DataError)
        assert outcome.everywhere
        assert f"{tmp_path} has no file phishing; get it from https://" in str(outcome)


def small_file(folder, values, ending=""):
    """A LIBSVM file of 40 rows; what is in it are these values."""
    lines = [f"{1 + row % 2} 1:{value:.6f} 2:1\n" for row, value in enumerate(values)]
    folder.mkdir(exist_ok=True)
    data = "".join(lines).encode()
    (folder / f"phishing{ending}").write_bytes(lzma.compress(data) if ending else data)


def test_files_are_known_by_their_content(tmp_path):
    """Ranks with other files of the same size are told; the same content under another name is the same, and is recorded."""
    values = np.random.default_rng(0).normal(size=40)
    small_file(tmp_path / "0", values)
    small_file(tmp_path / "1", values + 1)
    small_file(tmp_path / "2", values, ".libsvm.xz")

    def program(comm, places):
        config = ReproduceConfig(data=tmp_path / places[comm.Get_rank()], out=tmp_path / places, steps=3)
        return reproduce.run(comm, "ef21-pp", config)

    for error in virtual.run(2, lambda comm: program(comm, "01")):
        assert isinstance(error, DisagreementError)
        assert "ranks disagree on the content of phishing: 40 rows of 2, sha256 " in str(error)
    virtual.results(2, lambda comm: program(comm, "02"))
    told = json.loads((tmp_path / "02" / "ef21-pp" / "summary.json").read_text())
    assert told["data"] == {"phishing": content_of(*load_libsvm(tmp_path / "0" / "phishing"))}
    assert (told["experiment"], told["ranks"], told["steps"]) == ("ef21-pp", 2, 3)


def test_a_target_that_is_not_reached_saves_nothing(monkeypatch):
    """It said "saved 0%" where both methods had been stopped."""
    monkeypatch.setattr(experiments, "smoothness", lambda *_: SimpleNamespace(quadratic_mean=1.0, arithmetic_mean=1.0))
    monkeypatch.setattr(experiments, "step_size", lambda *_: 0.1)
    ends = iter([(7, 1e-3), (7, 1e-3), (7, 1e-3), (5, 1e-7), (4, 1e-7), (3, 1e-7)])

    def descend(*_, **options):
        steps, squared = next(ends)
        return Curve([steps], [squared], [1.0], [1.0])

    monkeypatch.setattr(experiments.Panels, "descend", descend)
    (outcome,) = virtual.results(1, lambda comm: experiments.weights(comm, ReproduceConfig()))
    assert [line.split()[3:] for line in outcome.table.splitlines()[1:4]] == [
        [">", "7", ">", "7", "-"], [">", "7", "5", "-"], ["4", "3", "25%"]]
    assert outcome.table.endswith("\n>: ||grad f||^2 < 1e-06 was not reached in so many steps; give more --steps")


def test_a_finished_experiment_stays_unless_it_may_be_overwritten(tmp_path):
    def run(**more):
        config = ReproduceConfig(out=tmp_path, **more)
        return virtual.run(2, lambda comm: reproduce.run(comm, "counterexample", config))

    assert run(steps=5) == [None, None]
    before = {path.name: path.read_bytes() for path in (tmp_path / "counterexample").iterdir()}
    assert before.keys() == {"metrics.jsonl", "summary.json", "table.txt", "counterexample.png"}
    for error in run(steps=25):
        assert error.everywhere
        assert "has a finished run (table.txt); give another --out, or pass --overwrite" in str(error)
    assert {path.name: path.read_bytes() for path in (tmp_path / "counterexample").iterdir()} == before
    with somebody_in(tmp_path / "counterexample"):
        assert all("writes a run there" in str(error) for error in run(steps=25, overwrite=True))
    assert run(steps=25, overwrite=True) == [None, None]
    assert (tmp_path / "counterexample" / "metrics.jsonl").read_bytes() != before["metrics.jsonl"]


def test_naive_compression_has_no_dense_steps():
    def program(comm, **more):
        problem = zeta_quadratics(range(2), 2, 8, 1.0, seed=1)
        return descend(comm, problem, 2, "naive", TopK(k=1), gamma=0.1, steps=3, x0=np.ones(8), **more)[1]

    one, other = (virtual.results(1, lambda comm, n=n: program(comm, dense_steps=n))[0] for n in (0, 2))
    assert one == other


@pytest.mark.parametrize(("argv", "text"), [
    (["speedup", "--data", "x"], "data=x has no effect with speedup; it goes with ef21, ef21-pp, ef21-bc, byz-ef21"),
    (["ef21-pp", "--methods", "ef21 Sign"], "methods=ef21 Sign has no effect with ef21-pp; it goes with ef21, econtrol, "),
    (["econtrol", "--methods", "econtrl TopK(0.1)"], "methods: there is no rule 'econtrl'; did you mean econtrol?"),
    (["econtrol", "--methods", "ef21 TopK(ration=0.1)"], "TopK has no option ration; did you mean ratio?"),
    (["econtrol", "--methods", "ef21 TopK(0.1) GatherMean"], "'ef21 TopK(0.1) GatherMean' is not RULE COMPRESSOR, such as"),
    (["ef21", "--attack", "alie"], "attack=alie has no effect with ef21; it goes with monna, byz-ef21"),
    (["econtrol", "--search-every", "1"], "search_every=1 has no effect with econtrol; it goes with monna, byz-ef21"),
    (["monna", "--attack", "alie,ipn(2)"], "attack: there is no attack 'ipn(2)'; did you mean ipm?"),
    (["monna", "--seeds", "0"], "seeds=0 is not a positive integer"),
    (["--list", "--steps", "3"], "--list"),
    (["ef12"], "there is no experiment 'ef12'; did you mean ef21?"),
    ([], "there is no experiment None; take one of ef21"),
    (["ef21", "--steps", "-1"], "steps=-1 is negative"),
    (["ef21", "--dta", "x"], "did you mean --data?"),
])
def test_wrong_command_lines(argv, text, capsys):
    with pytest.raises(SystemExit) as caught:
        reproduce.main(argv)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_list(capsys):
    reproduce.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)
