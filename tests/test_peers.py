"""Vectors from each rank to each, of which some are awaited: whoever is silent, late or lies stops nobody."""

from types import SimpleNamespace

import numpy as np
import pytest
import virtual

from mpi_ef.collectives import Peers
from mpi_ef.collectives.late import Frame, Late
from mpi_ef.errors import (
    DisagreementError,
    DtypeError,
    MpiEfError,
    NonFiniteError,
    OptionError,
    ShapeError,
    SilenceError,
)
from mpi_ef.testing.faults import FaultyComm
from mpi_ef.testing.law import same_bits

both = pytest.mark.parametrize("eager", [True, False], ids=["eager", "rendezvous"])  # what MPI libraries make of a send


def vector(rank, number, d=3):
    return np.arange(d) / 8 + 10.0 * number + rank


def rounds(peers, count, log, pause=lambda: None):
    """Exchange up to a round; note what was returned."""
    while peers.round < count:
        heard = peers.exchange(vector(peers.rank, peers.round))
        assert same_bits(heard.rows[heard.own], vector(peers.rank, heard.round)) or heard.jumped
        assert heard.ranks[heard.own] == peers.rank
        log.append((heard.round, heard.jumped, heard.ranks, heard.rows.copy()))
        pause()
    return log


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_where_all_are_there_all_have_the_same_rows_in_rank_order(n, dtype, eager):
    def program(comm):
        rows = []
        with Peers(comm, 4, dtype, wait_for=n) as peers:
            for number in range(12):
                heard = peers.exchange(vector(comm.Get_rank(), number, 4).astype(dtype))
                assert heard.ranks == tuple(range(n))
                assert heard[2:] == (comm.Get_rank(), number, False)
                assert heard.rows.dtype == dtype
                rows.append(heard.rows.copy())
                if number % 3 == comm.Get_rank():
                    comm.pause(0.01)
        assert peers.close() == ()
        return rows, peers.metrics

    expected = [np.array([vector(rank, number, 4) for rank in range(n)], dtype) for number in range(12)]
    for rows, metrics in virtual.results(n, program, eager=eager):
        assert same_bits(rows, expected)
        assert metrics == {"rounds": 12, "jumps": 0, "late": 0, "withheld": 0, "not_finite": 0, "silent": 0}


@both
def test_a_rank_that_never_speaks_stops_nobody_and_is_named_once(eager, capsys):
    def program(comm):
        peers = Peers(comm, 3, np.float64, wait_for=4, patience_seconds=0.5)
        if comm.Get_rank() == 2:
            return None
        log = rounds(peers, 60, [], lambda: comm.pause(0.02))
        assert peers.silent == (2,)
        assert peers.close() == (2,)
        return log, peers.metrics

    for result in virtual.results(5, program, eager=eager):
        if result:
            log, metrics = result
            assert [entry[:3] for entry in log] == [(number, False, (0, 1, 3, 4)) for number in range(60)]
            assert metrics["withheld"] == 60 - 4 - 1  # all that were not sent, but for the last one, which may still be
            assert metrics["silent"] == 1
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "rank 2 on node 2 said nothing for 0.5 s" in line]) == 4
    assert len([line for line in lines if "rank 2 on node 2 did not end with rank" in line]) == 4
    assert len(lines) == 8


@both
@pytest.mark.parametrize("skipped", [2, 4, 5, 6, 30])
def test_a_rank_that_was_stopped_for_some_rounds_gets_them_or_jumps(skipped, eager):
    """The others have a round each 10 ms. Up to `window` of them are sent to it, and later ones when it speaks."""
    def program(comm):
        with Peers(comm, 3, np.float64, wait_for=3, patience_seconds=5) as peers:
            log = rounds(peers, 3, [], lambda: comm.pause(0.01))
            if comm.Get_rank() == 1:
                comm.pause(0.01 * skipped)
            rounds(peers, 50, log, lambda: comm.pause(0.01 * (comm.Get_rank() != 1)))
        return log, peers.metrics

    results = virtual.results(4, program, eager=eager)
    for rank, (log, metrics) in enumerate(results):
        jumps = [entry for entry in log if entry[1]]
        assert len(jumps) == metrics["jumps"] == (rank == 1 and skipped > 4)
        assert [entry[0] for entry in log if not entry[1]][-1] == 49
        assert metrics["rounds"] == len(log)
        for number, jumped, ranks, rows in log:
            if not jumped:
                assert same_bits(rows, np.array([vector(one, number) for one in ranks]))
    for number, _, ranks, rows in (entry for entry in results[1][0] if entry[1]):
        assert number == 3 + skipped  # where the others are
        assert ranks == (0, 1, 2, 3)
        assert same_bits(rows[[0, 2, 3]], np.array([vector(one, number) for one in (0, 2, 3)]))
        assert rows[1, 0] < vector(1, number)[0]


def test_a_rank_that_goes_on_after_all_others_have_ended_comes_to_the_end_too():
    def program(comm):
        with Peers(comm, 3, np.float64, wait_for=3, patience_seconds=5) as peers:
            if comm.Get_rank() == 3:
                comm.pause(2)
            return rounds(peers, 40, [], lambda: comm.pause(0.01))

    *others, late = virtual.results(4, program)
    assert [entry[:3] for entry in late][:5] == [*((number, False, (0, 1, 2, 3)) for number in range(4)),
                                                 (39, True, (0, 1, 2, 3))]
    assert late[-1][0] == 39
    assert same_bits(late[-1][3][:3], np.array([vector(rank, 39) for rank in range(3)]))
    assert all(len(log) == 40 for log in others)


@both
def test_a_rank_that_has_jumped_is_sent_what_follows(eager):
    """Its next message is far: it computes while the others have three rounds."""
    def program(comm):
        with Peers(comm, 3, np.float64, wait_for=3, patience_seconds=5) as peers:
            mine = comm.Get_rank() == 1
            comm.pause(0.1 * mine)
            rounds(peers, 60, [], lambda: comm.pause((0.005 + 0.025 * (peers.rounds == 5)) if mine else 0.01))
            return peers.jumps  # after four rounds

    assert virtual.results(4, program, eager=eager) == [0, 1, 0, 0]


def lying(peers, step, wire=None, to=None):
    """Send a frame with any header and content."""
    frame = peers._late.frame()
    frame.step = step
    frame.wire[:] = 0 if wire is None else wire.view(np.uint8)
    for rank in peers._peers if to is None else to:
        peers._late.send(rank, frame)
    peers._late.drop(frame)


@both
@pytest.mark.parametrize("claims", [[10**15, 2**63 - 1], [-(2**63), -1], [2, 4], [10**9] * 300],
                         ids=["far ahead", "ended", "a little ahead", "flood"])
def test_rounds_that_liars_claim_lead_nobody_there(claims, eager):
    """Two of nine lie of their round all the time; one is stopped and jumps to where the others are."""
    def program(comm):
        rank = comm.Get_rank()
        peers = Peers(comm, 3, np.float64, wait_for=6, patience_seconds=1)
        if rank in {2, 5}:
            for claim in claims:
                lying(peers, claim)
                comm.pause(0.001)
            for _ in range(40):
                peers.progress()
                comm.pause(0.01)
            return peers._late
        log = rounds(peers, 3, [], lambda: comm.pause(0.01))
        if rank == 6:
            comm.pause(0.1)
        rounds(peers, 40, log, lambda: comm.pause(0.01 * (rank != 6)))
        sent = [peers._late.under_way(rank) for rank in (2, 5)]
        peers.close()
        return log, sent

    for rank, result in enumerate(virtual.results(9, program, eager=eager)):
        if rank not in {2, 5}:
            log, sent = result
            assert [entry[0] for entry in log if not entry[1]][-1] == 39
            assert all(number < 40 for number, *_ in log)
            assert sum(entry[1] for entry in log) == (rank == 6) or claims == [2, 4]
            assert max(sent) <= 8


def test_who_sends_something_else_to_each_is_heard_as_such():
    def program(comm):
        rank = comm.Get_rank()
        peers = Peers(comm, 3, np.float64, wait_for=4, patience_seconds=1)
        if rank == 2:
            for other in (0, 1, 3):
                lying(peers, 0, np.full(3, 100.0 + other), [other])
            lying(peers, 0, np.full(3, -1.0))  # a second one of the same round
            return None
        comm.pause(0.01 * (rank == 3))  # the others look more than once
        return peers.exchange(vector(rank, 0)).rows[2, 0]

    assert virtual.results(4, program) == [100.0, 101.0, None, 103.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None], ids=["nan", "inf", "-inf", "square overflows"])
def test_a_vector_that_is_not_finite_counts_as_none(bad, dtype):
    def program(comm):
        rank = comm.Get_rank()
        with Peers(comm, 3, dtype, wait_for=3, patience_seconds=1) as peers:
            for number in range(10):
                x = vector(rank, number).astype(dtype)
                if rank == 0 and number != 5:
                    lying(peers, number, np.array([1, np.sqrt(np.finfo(dtype).max) * 2 if bad is None else bad, 1], dtype))
                    peers._sent = peers.round = number + 1
                else:
                    heard = peers.exchange(x)
                    assert 0 not in heard.ranks or number == 5
                    assert not heard.jumped
                comm.pause(0.01)
            return peers.not_finite

    assert virtual.results(4, program)[1:] == [9, 9, 9]


def test_what_is_not_finite_here_is_not_sent():
    def program(comm):
        with Peers(comm, 3, np.float32, wait_for=3) as peers:
            rank = comm.Get_rank()
            if rank == 1:
                with pytest.raises(NonFiniteError, match="Peers: x of rank 1 is not finite, .* nothing was sent") as said:
                    peers.exchange(np.array([1, np.nan, 1], np.float32))
                assert not said.value.everywhere
                assert said.value.ranks == (1,)
                comm.pause(0.1)
            return peers.exchange(np.full(3, rank, np.float32)).rows

    assert all(same_bits(rows, np.repeat(np.arange(3, dtype=np.float32), 3).reshape(3, 3))
               for rows in virtual.results(3, program))


@both
def test_where_too_few_speak_all_that_are_there_say_who_is_missing(eager):
    def program(comm):
        rank = comm.Get_rank()
        peers = Peers(comm, 3, np.float64, wait_for=4, patience_seconds=0.25)
        if rank == 4:
            lying(peers, 0, np.full(3, np.nan))
        if rank in {1, 4}:
            comm.pause(1.0 if rank == 1 else 3.0)
            return rounds(peers, 1, []) if rank == 1 else None
        with pytest.raises(SilenceError) as raised:
            rounds(peers, 1, [])
        assert raised.value.ranks == (1, 4)
        assert peers.silent == (1, 4)
        with pytest.raises(SilenceError):
            rounds(peers, 1, [])
        peers.patience_seconds = 2.0
        return str(raised.value), rounds(peers, 1, [])[0][2], peers.silent

    results = virtual.results(5, program, eager=eager)
    for rank in (0, 2, 3):
        assert results[rank] == (
            f"Peers: rank {rank} has 3 of the 4 vectors awaited in round 0: no vector of rank 1 on node 1, rank 4 on node 4 "
            "for 0.25 s; start again without them, from what was saved", (0, 1, 2, 3), (4,))


def test_a_rank_that_was_stopped_itself_does_not_take_the_others_for_silent(monkeypatch):
    """Its clock has gone on: what it has not looked for it has not waited for."""
    def program(comm):
        peers = Peers(comm, 3, np.float64, wait_for=2, patience_seconds=0.5)
        if comm.Get_rank() == 0:
            first = comm.clock() + 0.01

            def now():
                return comm.clock() + 1000 * (comm.clock() > first)

            peers._late.now = now
        else:
            comm.pause(0.3)
        return rounds(peers, 2, [])

    assert len(virtual.results(2, program)[0]) == 2


def test_ranks_that_end_early_are_not_waited_for():
    def program(comm):
        with Peers(comm, 3, np.float64, wait_for=3, patience_seconds=3) as peers:
            rounds(peers, 5, [])
            if comm.Get_rank() > 1:
                return None
            began = comm.clock()
            with pytest.raises(SilenceError, match=r"rank 2 on node 2, rank 3 on node 3 ended before; "):
                rounds(peers, 6, [])
            return comm.clock() - began

    assert all(seconds < 0.1 for seconds in virtual.results(4, program)[:2])


def test_a_rank_that_counts_its_calls_is_told_that_jumps_have_left_rounds_out():
    def program(comm):
        with Peers(comm, 3, np.float64, wait_for=3, patience_seconds=3) as peers:
            for number in range(20):
                comm.pause(1 if (comm.Get_rank(), number) == (1, 4) else 0.01)
                try:
                    peers.exchange(vector(comm.Get_rank(), number))
                except SilenceError as error:
                    return str(error)
        return peers.round

    told = virtual.results(4, program)
    assert [told[rank] for rank in (0, 2, 3)] == [20] * 3
    assert told[1].endswith("ended before; 1 jump left rounds out: take steps while peers.round is below theirs at the end")


@both
def test_a_rank_that_fails_is_not_waited_for_at_the_end(eager):
    def program(comm):
        try:
            with Peers(comm, 3, np.float64, wait_for=3, patience_seconds=100) as peers:
                comm.pause(0.1 * (comm.Get_rank() == 1))  # too far behind to be sent anything
                rounds(peers, 20, [], lambda: comm.pause(0.001))
                if comm.Get_rank() == 2:
                    raise ZeroDivisionError
                rounds(peers, 30, [], lambda: comm.pause(0.001))
        except ZeroDivisionError:
            return None
        assert peers.close() == (2,)
        return comm.clock()

    assert all(seconds < 1 for seconds in virtual.results(4, program, eager=eager)
               if seconds is not None)


class Suspended(virtual.VirtualComm):
    """Is stopped for two seconds, from the first rest on that ends after 2 s of the clock."""

    def pause(self, seconds):
        super().pause(seconds)
        if self.clock() > 2 and not vars(self).setdefault("over", False):
            self.over = True
            super().pause(2)


@both
def test_where_all_ranks_are_stopped_and_go_on_no_slow_one_is_named_as_silent(eager, capsys):
    """As a batch system does with jobs: rank 3, which is slow, was silent no longer than the others have listened."""
    def program(comm):
        late = comm.Get_rank() == 3
        with Peers(Suspended(comm._world, comm.Get_rank()), 3, np.float64, wait_for=3, patience_seconds=1) as peers:
            while peers.round < 250:
                peers.exchange(vector(comm.Get_rank(), peers.round))
                comm.pause((2.8 if 1.5 < comm.clock() < 2 else 0.8) if late else 0.01)
                assert peers.silent == ()
            assert peers.close(100) == ()
            return comm.clock()

    assert all(seconds > 4 for seconds in virtual.results(4, program, eager=eager))
    assert capsys.readouterr().err == ""


@both
def test_a_silent_rank_gets_few_messages(eager):
    """Whatever MPI makes of a send; a message that is not taken stays in its memory, or the receiver's."""
    def program(comm):
        counting = FaultyComm(comm)
        peers = Peers(counting, 3, np.float64, wait_for=3, window=3, patience_seconds=0.2)
        if comm.Get_rank() == 3:
            return None
        rounds(peers, 30, [], lambda: comm.pause(0.001))
        before = counting.calls.count("Isend")
        peers.close()
        return before, len(peers._late._free[24]), counting.calls.count("Isend") - before

    for result in virtual.results(4, program, eager=eager)[:3]:
        sent, frames, last = result
        assert sent == 2 * 30 + 3
        assert last == 2
        assert frames <= 3 * 3 + 3 * 3


def test_no_memory_is_taken_after_the_first_rounds(monkeypatch):
    made = []

    class Counted(Frame):
        def __init__(self, nbytes):
            made.append(nbytes)
            super().__init__(nbytes)

    monkeypatch.setattr("mpi_ef.collectives.late.Frame", Counted)

    def program(comm):
        with Peers(comm, 3, np.float64, wait_for=4, patience_seconds=0.1) as peers:
            if comm.Get_rank() == 5:
                for number in range(200):
                    lying(peers, number, np.full(3, np.nan))
                    peers.progress()
                    comm.pause(0.001)
                return 0
            for stop in (20, 200):
                rounds(peers, stop, [], lambda: comm.pause(0.001 * ((comm.Get_rank() + peers.round) % 3)))
                made_by.append(len(made))
        return peers.not_finite

    made_by = []
    assert min(virtual.results(6, program)[:5]) > 100
    assert made_by[4] == len(made)  # when all have done the first 20 rounds


def test_nothing_comes_after_the_last_message():
    def program(comm):
        late = Late(comm, [1 - comm.Get_rank()], 8, 8, 0)
        if comm.Get_rank():
            for step in (3, -1, 4):
                frame = late.frame()
                frame.step = step
                late.send(0, frame)
            return None
        comm.pause(1.0)
        seen = [frame.step for _ in range(5) for _, frame in late.poll()]
        late.close()
        return seen

    assert virtual.results(2, program)[0] == [3, -1]


class Quiet(virtual.VirtualComm):
    """Notes how long its rank pauses."""

    def pause(self, seconds):
        vars(self).setdefault("pauses", []).append(seconds)
        super().pause(seconds)


def test_a_rank_that_waits_rests_longer_and_longer():
    def program(comm):
        mine = Quiet(comm._world, comm.Get_rank())
        late = Late(mine, [1 - comm.Get_rank()], 8, 8, 0)
        if comm.Get_rank():
            comm.pause(0.02)
            late.send(0, late.frame())
            return None
        while not late.poll():
            late.rest()
        late.rest()
        late.close()
        return mine.pauses

    *waiting, after = virtual.results(2, program)[0]
    assert waiting[0] == after == 20e-6
    assert max(waiting) == 1e-3
    assert all(later == min(2 * earlier, 1e-3) for earlier, later in zip(waiting, waiting[1:], strict=False))


def worker(comm):
    """Answer models with a number until the last one comes; return the steps of all."""
    late, seen = Late(comm, [0], 8, 24, 0), [0]
    while seen[-1] >= 0:
        for _, frame in late.poll():
            seen.append(frame.step)
            comm.pause(0.05 * comm.Get_rank())
            answer = late.frame()
            answer.step = frame.step
            answer.wire.view(np.float64)[:] = frame.wire.view(np.float64).sum()
            late.send(0, answer)
            for done in (frame, answer):
                late.drop(done)
        late.rest()
    late.close()
    return seen[1:]


def server(comm):
    """Send models, each to those workers that have answered the one before, and wait for worker 1 alone."""
    late, busy, answers = Late(comm, [1, 2], 24, 8, 0), {1: False, 2: False}, []
    for step in [*range(6), -1]:
        model = late.frame()
        model.step, model.wire.view(np.float64)[:] = step, step
        for worker in [one for one, waits in busy.items() if not waits or step < 0]:
            late.send(worker, model)
            busy[worker] = True
        late.drop(model)
        while busy[1] and step >= 0:
            for worker, frame in late.poll():
                answers.append((worker, frame.step, float(frame.wire.view(np.float64)[0])))
                busy[worker] = False
                late.drop(frame)
            late.rest()
    while late.under_way(1) or late.under_way(2):
        late.poll()
        late.rest()
    late.close()
    return answers


@both
def test_servers_and_workers_send_messages_of_other_sizes(eager):
    """Models go down, answers come up; one that is late frees its worker, which gets the newest model then."""
    answers, quick, slow = virtual.results(3, lambda comm: worker(comm) if comm.Get_rank() else server(comm), eager=eager)
    assert quick == [0, 1, 2, 3, 4, 5, -1]
    assert slow == [0, 2, 4, -1]
    assert sorted(answers)[:8] == [*((1, step, 3.0 * step) for step in range(6)), (2, 0, 0.0), (2, 2, 6.0)]


WRONG = [
    ({"wait_for": 5}, OptionError, r"Peers: wait_for=5 is not a positive integer up to 4; with f wrong ones of 4 ranks"),
    ({"wait_for": 0}, OptionError, r"Peers: wait_for=0 is not a positive integer up to 4"),
    ({"window": 0}, OptionError, r"Peers: window=0 is not a positive integer; 4 is usual"),
    ({"patience_seconds": 0}, OptionError, r"Peers: patience_seconds=0 is not in \(0, inf\); 300 is usual"),
    ({"d": 0}, OptionError, r"Peers: d=0 is not a positive integer"),
    ({"d": 2**29}, OptionError, r"Peers: d=536870912 is not a positive integer up to 268435454"),
    ({"dtype": np.int32}, DtypeError, r"Peers: dtype=int32 is neither float32 nor float64"),
    ({"device": "cuda:0"}, OptionError, r"Peers: device='cuda:0': vectors are sent from the host alone"),
]


@pytest.mark.parametrize(("wrong", "kind", "text"), WRONG, ids=[next(iter(wrong)) for wrong, *_ in WRONG])
def test_wrong_options_are_one_line_on_all_ranks(wrong, kind, text):
    def program(comm):
        with pytest.raises(kind, match=text) as raised:
            Peers(comm, **({"d": 3, "dtype": np.float64, "wait_for": 3} | wrong))
        assert raised.value.everywhere
        return "\n" in str(raised.value)

    assert not any(virtual.results(4, program))


def test_ranks_that_want_different_things_are_told():
    def program(comm):
        with pytest.raises(DisagreementError, match="Peers: ranks disagree on wait_for: 3 on rank 0; 2 on ranks 1,2"):
            Peers(comm, 3, wait_for=2 + (comm.Get_rank() == 0))

    virtual.results(3, program)


def test_a_communicator_without_messages_of_ones_own_pace_is_refused():
    def program(comm):
        group = SimpleNamespace(**{name: getattr(comm, name) for name in ("Get_size", "Get_rank", "Is_inter", "allgather")},
                                Iallgather=None)
        with pytest.raises(OptionError, match="is none of MPI, where ranks may be silent; pass for example MPI.COMM_WORLD"):
            Peers(group, 3, wait_for=2)

    virtual.results(2, program)
    with pytest.raises(OptionError, match="comm=None is not an intracommunicator"):
        Peers(None, 3, wait_for=2)


def test_vectors_that_do_not_fit_are_not_sent():
    def program(comm):
        with Peers(comm, 3, np.float64, wait_for=2) as peers:
            for wrong, kind in ((np.ones(4), ShapeError), (np.ones(3, np.float32), DtypeError), ([1.0] * 3, DtypeError),
                                (np.ones(6)[::2], ShapeError)):
                with pytest.raises(kind, match="^Peers: x"):
                    peers.exchange(wrong)
            peers.exchange(np.ones(3))
        with pytest.raises(OptionError, match="this rank has closed them"):
            peers.exchange(np.ones(3))
        peers.progress()

    virtual.results(2, program)


def any_training(seed, n, f, eager, count=60):
    """Ranks of any speed, of which f lie (n > 3 f), are silent, or die, while two of all stop for a while."""
    draw = np.random.default_rng(seed)
    wrong = set(draw.permutation(n)[:f].tolist())
    faults = ["silent", "dies", "garbage", "ahead", "behind", "nan"][: 6 if n > 3 * f else 2]
    kinds = {rank: str(draw.choice(faults)) for rank in wrong}
    speed = 10.0 ** draw.uniform(-5, -2, n)
    stops = {int(rank): (int(draw.integers(count)), 10.0 ** draw.uniform(-3, -0.5)) for rank in draw.permutation(n)[:2]}

    def program(comm):
        rank = comm.Get_rank()
        mine = np.random.default_rng((seed, rank))
        peers = Peers(comm, 2, np.float64, wait_for=n - f, patience_seconds=2, window=int(1 + seed % 5))
        kind = kinds.get(rank, "")
        dies = int(mine.integers(count)) if kind == "dies" else count
        if kind == "silent":
            return None
        if kind not in {"", "dies"}:
            for number in range(3 * count):
                step = {"ahead": number + 5, "behind": number // 4, "nan": number}.get(kind, int(mine.integers(-5, 2**40)))
                lying(peers, step, np.frombuffer(mine.bytes(16)) if kind != "nan" else np.full(2, np.nan))
                peers.progress()
                comm.pause(speed[rank] * mine.exponential())
            return None
        stopped, jumps = False, 0
        while peers.round < count:
            if peers.round >= dies:
                return None
            if not stopped and peers.round >= stops.get(rank, (count, 0))[0]:
                stopped = True
                comm.pause(stops[rank][1])
            number = peers.round
            heard = peers.exchange(np.full(2, float(number)))
            jumps += heard.jumped
            assert len(heard.ranks) >= n - f or heard.jumped
            assert heard.round > number if heard.jumped else heard.round == number
            assert heard.round < count
            trusted = [row for row, one in zip(heard.rows, heard.ranks, strict=True) if one not in kinds]
            assert all(same_bits(row, np.full(2, float(number))) for row in trusted) or heard.jumped
            comm.pause(speed[rank] * mine.exponential())
        peers.close()
        return jumps

    results = virtual.run(n, program, eager=eager)
    failed = {rank: result for rank, result in enumerate(results) if isinstance(result, BaseException)}
    assert not failed, (seed, kinds, failed)
    assert all(result is not None for rank, result in enumerate(results) if rank not in kinds)
    return sum(result or 0 for result in results)


SIZES = [(3, 0), (4, 1), (5, 1), (7, 2), (10, 3), (3, 1), (5, 2)]


@both
@pytest.mark.parametrize(("n", "f"), SIZES)
def test_whatever_f_ranks_do_the_others_come_to_the_end(n, f, eager):
    for seed in range(2 if n < 7 else 1):
        any_training(seed, n, f, eager)


@pytest.mark.exhaustive
@both
@pytest.mark.parametrize(("n", "f"), SIZES)
def test_whatever_f_ranks_do_the_others_come_to_the_end_at_any_pace(n, f, eager):
    assert sum(any_training(seed, n, f, eager) for seed in range(4, 60)) > 0 or f == 0


def test_an_error_of_silence_is_one_of_ours():
    assert issubclass(SilenceError, MpiEfError)
    assert not SilenceError("x").everywhere
