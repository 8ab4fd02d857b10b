"""What a folder of checkpoints is believed: names, runs, and that replicas are the same."""

import logging
import shutil

import numpy as np
import pytest
from checkpoint_cases import save
from virtual import results, run

from mpi_ef import Training
from mpi_ef.checkpoint import Store
from mpi_ef.errors import CheckpointError, DisagreementError


def newest(folder):
    return results(2, lambda comm: Store(folder).newest(comm))[0]


def test_a_copy_under_the_name_of_another_step_is_not_used(tmp_path, caplog):
    path = save(tmp_path, 50)
    shutil.copytree(path, tmp_path / "step-00000900")
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path).step == 50
    assert "it is the checkpoint of step 50 under the name of another step" in caplog.text


def test_a_step_of_another_run_is_not_used(tmp_path, caplog):
    save(tmp_path / "mine", 50)
    other = save(tmp_path / "other", 900)
    shutil.copytree(other, tmp_path / "mine" / other.name)
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path / "mine").step == 50
    assert "which has not written it here" in caplog.text
    assert newest(tmp_path / "mine").step == 50
    assert not list((tmp_path / "mine").glob("*/BAD"))  # nothing is wrong with it


@pytest.mark.parametrize("text", ["", "0123456789abcdef" * 2 + "\n", "\0" * 33])
def test_notes_that_were_damaged_begin_no_run_from_nothing(tmp_path, text):
    save(tmp_path, 50)
    (tmp_path / "RUNS").write_text(text)
    outcomes = run(2, lambda comm: Store(tmp_path).newest(comm))
    if not text:
        assert [outcome.step for outcome in outcomes] == [50, 50]
        return
    for outcome in outcomes:
        assert isinstance(outcome, CheckpointError)
        assert "RUNS names no run that has written the checkpoints there, up to step 50; remove RUNS if" in str(outcome)


def test_a_folder_from_before_runs_had_a_file_is_read(tmp_path):
    save(tmp_path, 50)
    (tmp_path / "RUNS").unlink()
    assert newest(tmp_path).step == 50


def test_a_replica_that_differs_is_not_saved_as_a_mix(tmp_path):
    """Every rank writes a part of what is the same on all: a part of what differs would be in the checkpoint."""

    def program(comm):
        weights = np.arange(1000.0)
        if comm.Get_rank() == 1:
            weights[3] = np.nextafter(weights[3], 9.0)
        Store(tmp_path).save(comm, 1, replicated={"bias": np.ones(3), "weight": weights}, per_rank={}, document=None,
                             rank_document=None)

    for outcome in run(3, program):
        assert isinstance(outcome, CheckpointError)
        assert "ranks disagree on the values of weight: hash" in str(outcome)
        assert "on ranks 0,2; hash" in str(outcome)
    assert newest(tmp_path) is None


def test_a_save_that_one_rank_alone_finishes_is_noticed(tmp_path):
    def program(comm):
        store, last = Store(tmp_path), comm.Get_rank() == 2
        store.save_async(
            comm, 1, replicated={}, per_rank={"x": np.full(9, comm.Get_rank())}, document=None, rank_document=None
        )
        if last:
            store.finish(comm)
        else:
            Training(random=False).save(store, comm, 2)

    for outcome in run(3, program):
        assert isinstance(outcome, DisagreementError)
        assert "different calls: Training.save on ranks 0,1; Store.save_async, step 1 on rank 2" in str(outcome)
