"""mpi-ef reproduce: the same numbers on any number of ranks, files where they belong, one line for what is wrong."""

import json

import numpy as np
import pytest
import virtual

from mpi_ef.errors import DataError
from mpi_ef.jobs import reproduce
from mpi_ef.jobs.reproduce import EXPERIMENTS, ReproduceConfig


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, experiment in EXPERIMENTS.items() if not experiment.wants_data])
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


@pytest.mark.parametrize(("argv", "text"), [
    (["ef12"], "there is no experiment 'ef12'; did you mean ef21?"),
    ([], "there is no experiment None; take one of ef21"),
    (["ef21", "--steps", "-1"], "steps=-1 is negative"),
    (["ef21", "--dta", "x"], "did you mean --data?"),
])  # fmt: skip
def test_wrong_command_lines(argv, text, capsys):
    with pytest.raises(SystemExit) as caught:
        reproduce.main(argv)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_list(capsys):
    reproduce.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)
