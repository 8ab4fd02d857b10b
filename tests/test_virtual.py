"""Virtual ranks: what one waits for comes, or it fails at once; nothing that they send is shared afterwards."""

import numpy as np
import pytest
import virtual

from mpi_ef.errors import OptionError
from mpi_ef.testing.virtual import DeadlockError


def _last(comm):
    return comm.Get_rank() == comm.Get_size() - 1


def _rows(comm, value):
    rows = np.empty((comm.Get_size(), 2))
    comm.Allgather(np.full(2, value), rows)
    return rows[:, 0].tolist()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_who_waits_for_a_rank_that_has_ended_fails(n):
    def program(comm):
        comm.Barrier()
        return None if _last(comm) else comm.allgather(1)

    *waiting, ended = virtual.run(n, program)
    assert ended is None
    for error in waiting:
        assert isinstance(error, DeadlockError)
        assert str(error).endswith(", ".join(f"rank {rank} in allgather" for rank in range(n - 1)))
    with pytest.raises(DeadlockError, match="ranks have come to their end; those that wait for them: rank 0 in allgather"):
        virtual.results(n, program)


@pytest.mark.parametrize("kind", [OptionError, ZeroDivisionError])
def test_the_error_of_one_rank_is_told_and_the_others_do_not_wait(kind):
    def program(comm):
        mine = _rows(comm, comm.Get_rank() + 1.0)
        if _last(comm):
            raise kind("rank 2 alone")
        _rows(comm, mine[0])

    before, after, alone = virtual.run(3, program)
    assert isinstance(before, DeadlockError)
    assert isinstance(after, DeadlockError)
    assert isinstance(alone, kind)
    with pytest.raises(kind, match="rank 2 alone"):
        virtual.results(3, program)


def test_what_is_complete_arrives_although_a_rank_fails_afterwards():
    seen = {}

    def program(comm):
        for step in range(3):
            seen[comm.Get_rank()] = _rows(comm, comm.Get_rank() + step)
            assert not (_last(comm) and step == 1), "at its second step"

    with pytest.raises(AssertionError, match="at its second step"):
        virtual.results(3, program)
    assert seen == {rank: [1.0, 2.0, 3.0] for rank in range(3)}


def test_an_error_that_all_ranks_raise_is_that_of_each():
    def program(comm):
        raise OptionError(f"rank {comm.Get_rank()}")

    assert [str(error) for error in virtual.run(3, program)] == ["rank 0", "rank 1", "rank 2"]


def test_different_calls_fail_on_all_ranks():
    def program(comm):
        return comm.Barrier() if _last(comm) else comm.allgather(1)

    for error in virtual.run(3, program):
        assert isinstance(error, AssertionError)
        assert "ranks make different MPI calls: [('allgather', None), ('allgather', None), ('Barrier', None)]" in str(error)


def test_what_was_sent_is_nobody_elses():
    def program(comm):
        rank, array, listed = comm.Get_rank(), np.full(2, float(comm.Get_rank())), [comm.Get_rank()]
        seen = comm.allgather(listed)
        listed.append("changed")
        seen[0].append(rank)
        assert seen == [[0, 0], [1]] if rank == 0 else [[0, 1], [1]]
        comm.Bcast(array)
        array += rank
        request = comm.Iallgather(array, rows := np.empty((2, 2)))
        array[:] = -1
        request.Wait()
        assert rows.tolist() == [[0, 0], [1, 1]]
        return _rows(comm, rows[rank, 0])

    assert virtual.results(2, program) == [[0.0, 1.0]] * 2


def test_what_mpi_could_not_send_fails():
    def program(comm):
        return comm.allgather(lambda: None)

    with pytest.raises(AttributeError, match="pickle"):
        virtual.results(2, program)


def test_ranks_that_pause_go_on_in_the_order_of_their_clock():
    """It stands still while a rank runs, and where one waits for another it does not count."""
    order = []

    def program(comm):
        rank = comm.Get_rank()
        for pause in ([0.5, 0.25], [0.25, 0.25, 0.5], [1.0])[rank]:
            comm.pause(pause)
            order.append((rank, comm.clock()))
        seen = comm.allgather(rank)
        return seen, comm.clock()

    assert virtual.results(3, program) == [([0, 1, 2], 1.0)] * 3
    assert order == [(1, 0.25), (0, 0.5), (1, 0.5), (0, 0.75), (2, 1.0), (1, 1.0)]


def test_a_rank_that_pauses_fails_where_another_has():
    def program(comm):
        if _last(comm):
            raise ZeroDivisionError
        while True:
            comm.pause(1.0)

    first, second, failed = virtual.run(3, program)
    assert isinstance(first, DeadlockError)
    assert isinstance(second, DeadlockError)
    assert isinstance(failed, ZeroDivisionError)


@pytest.mark.parametrize("eager", [True, False])
def test_a_message_may_be_looked_for_without_waiting(eager):
    def program(comm):
        x = np.ones(2)
        if comm.Get_rank() == 0:
            request = comm.Isend(np.full(2, 7.0), 1, 5)
            done = [request.Test()]
            comm.pause(1.0)
            return [*done, request.Test(), request.Test()]
        request = comm.Irecv(x, 0, 6)
        assert not request.Test()
        request.Cancel()
        assert request.Test()
        request = comm.Irecv(x, 0, 5)
        comm.pause(0.5)
        assert request.Test()
        assert request.Test()
        assert x.tolist() == [7.0, 7.0]
        request.Wait()
        return None

    assert virtual.results(2, program, eager=eager)[0] == [eager, True, True]


def test_a_split_makes_groups_that_communicate_by_themselves():
    """In the order of keys, then ranks; groups of groups; each at its own pace."""

    def program(comm):
        rank = comm.Get_rank()
        group = comm.Split(rank % 2, -rank)
        for _ in range(1 + rank % 2):  # not as often in both
            seen = group.allgather(rank)
        alone = group.Split(group.Get_rank()).allgather(rank)
        other = comm.Split(rank // 3).allgather(rank)
        return seen, alone, other, _rows(group, rank), comm.allgather(group.Get_size())

    for rank, (seen, alone, other, rows, sizes) in enumerate(virtual.results(7, program)):
        assert seen == rows == sorted(range(rank % 2, 7, 2), reverse=True)
        assert alone == [rank]
        assert other == [r for r in range(7) if r // 3 == rank // 3]
        assert sizes == [4, 3] * 3 + [4]


def test_who_waits_in_a_group_for_a_rank_that_has_ended_fails():
    def program(comm):
        group = comm.Split(comm.Get_rank() // 2)
        if comm.Get_rank() == 3:
            return "ended"
        return len(group.allgather(1)) + len(comm.Split(comm.Get_rank()).allgather(2))

    outcomes = virtual.run(4, program)
    assert outcomes[3] == "ended"
    assert all(isinstance(outcome, DeadlockError) for outcome in outcomes[:3])
    assert "rank 2 in allgather" in str(outcomes[0])
