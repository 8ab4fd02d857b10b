"""Which rank is on which node, and what follows: dense means between nodes go in pairs, with the same bits."""

import numpy as np
import pytest
import virtual
from programs import PLANS as OF_RANKS
from vectors_for_tests import gaussian

from mpi_ef.collectives import ClientsMean, DenseMean, GatherMean, LowRankMean, TwoPhaseMean, pairwise
from mpi_ef.comm.nodes import RANKS_PER_NODE, Nodes, node_name, nodes_of
from mpi_ef.compress import LowRank, Quantize, TopK
from mpi_ef.errors import NonFiniteError, OptionError, PeerError
from mpi_ef.testing.faults import CommunicationError, FaultyComm
from mpi_ef.testing.virtual import DeadlockError

PLANS = OF_RANKS | {"clients": lambda comm, d, dtype: ClientsMean(comm, TopK(0.1), d, dtype, clients=comm.Get_size() + 2)}


def test_nodes_are_numbered_by_their_first_ranks():
    nodes = Nodes.named(["b", "a", "b", "c", "a", "b"])
    assert nodes.numbers == (0, 1, 0, 2, 1, 0)
    assert (nodes.count, nodes.sizes, nodes.largest, nodes.beside(4)) == (3, (3, 2, 1), 3, [1, 4])
    assert Nodes.of_size(5, 2) == Nodes((0, 0, 1, 1, 2))


def test_virtual_ranks_have_nodes_of_their_own_unless_told():
    def program(comm):
        return nodes_of(comm).numbers, nodes_of(comm) is nodes_of(comm), DenseMean(comm, 4).nodes.numbers

    assert set(virtual.results(3, program)) == {((0, 1, 2), True, (0, 1, 2))}
    assert set(virtual.results(5, program, ranks_per_node=2)) == {((0, 0, 1, 1, 2), True, (0, 0, 1, 1, 2))}


def test_the_environment_tells_how_many_ranks_are_taken_for_a_node(monkeypatch):
    monkeypatch.setenv(RANKS_PER_NODE, "3")
    assert virtual.results(4, lambda comm: nodes_of(comm).numbers)[0] == (0, 0, 0, 1)
    for text in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv(RANKS_PER_NODE, text)
        with pytest.raises(OptionError, match=f"MPI_EF_RANKS_PER_NODE='{text}' is not a whole number from 1 on"):
            virtual.results(1, node_name)
        with pytest.raises(OptionError, match="MPI_EF_RANKS_PER_NODE"):
            virtual.results(2, lambda comm: DenseMean(comm, 4))


def test_a_name_that_is_wrong_on_one_rank_is_told_on_all(monkeypatch):
    from mpi_ef.collectives import plan as module

    def named(comm):
        if comm.Get_rank():
            raise OptionError("rank 1 is lost")
        return "here"

    monkeypatch.setattr(module, "node_name", named)
    first, second = virtual.run(2, lambda comm: DenseMean(comm, 4))
    assert isinstance(first, PeerError)
    assert "rank 1 is lost" in str(first)
    assert isinstance(second, OptionError)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("d", [0, 1, 7, 63, 64, 500])
def test_pairs_give_the_bits_of_all_at_once(n, d, monkeypatch):
    """Whole blocks, a shorter last one, slices without entries: the bits are the same."""
    monkeypatch.setattr(pairwise, "MESSAGE_NBYTES", 64)

    def program(comm):
        counting = FaultyComm(comm)
        plan = DenseMean(counting, d, np.float64)
        counting.sent_nbytes = 0
        mean = plan.exchange(gaussian(comm.Get_rank(), d, np.float64)).mean.copy()
        assert counting.sent_nbytes == plan.traffic.sent_nbytes == plan.sent_nbytes
        return mean.tobytes(), "Isend" in counting.calls, "Alltoallv" in counting.calls

    in_pairs, at_once = (virtual.results(n, program, ranks_per_node=s) for s in (1, n))
    expected = np.zeros(d)
    for rank in range(n):
        expected += gaussian(rank, d, np.float64) * (1 / n)
    assert {mean for mean, *_ in in_pairs + at_once} == {expected.tobytes()}
    assert not any(isend for _, isend, _ in at_once)
    if n > 1:
        assert not any(alltoallv for *_, alltoallv in in_pairs)
        assert all(isend for _, isend, _ in in_pairs) or d < n


@pytest.mark.parametrize(("n", "s"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 4)])
@pytest.mark.parametrize("d", [64, 65, 500, 2000])
def test_a_chain_gives_the_bits_of_pairs(n, s, d, monkeypatch):
    """Where several ranks have one link and vectors are long; a vector crosses it once on either way."""
    monkeypatch.setattr(pairwise, "MESSAGE_NBYTES", 64)

    def program(comm):
        counting = FaultyComm(comm)
        plan = DenseMean(counting, d, np.float32)
        counting.sent_nbytes = 0
        mean = plan.exchange(gaussian(comm.Get_rank(), d)).mean.copy()
        assert counting.sent_nbytes == plan.traffic.sent_nbytes == plan.sent_nbytes
        return mean.tobytes(), plan._rank_order._in_chain(plan.nodes), plan.link_traffic.nbytes

    rows = virtual.results(n, program, ranks_per_node=s)
    assert {mean for mean, *_ in rows} == {mean for mean, *_ in virtual.results(n, program, ranks_per_node=n)}
    chained = s > 1
    assert {chain for _, chain, _ in rows} == {chained}
    if chained:
        words = 2 * 8 * n  # each rank's, gathered twice
        assert rows[0][2] <= 2 * 4 * d + words


def test_ranks_that_are_dealt_out_to_nodes_make_no_chain(monkeypatch):
    """It would cross a link for every rank."""
    monkeypatch.setattr(pairwise, "MESSAGE_NBYTES", 64)
    module = __import__("mpi_ef.collectives.plan", fromlist=["node_name"])
    monkeypatch.setattr(module, "node_name", lambda comm: f"node {comm.Get_rank() % 2}")
    plans = virtual.results(4, lambda comm: DenseMean(comm, 1000)._rank_order._in_chain(DenseMean(comm, 1000).nodes))
    assert plans == [False] * 4


def test_a_sum_that_overflows_in_a_chain_is_told_on_all_ranks(monkeypatch):
    monkeypatch.setattr(pairwise, "MESSAGE_NBYTES", 64)

    def program(comm):
        plan = DenseMean(comm, 500)
        with pytest.raises(NonFiniteError):
            plan.exchange(np.full(500, 3e38, np.float32) * (1 if comm.Get_rank() < 3 else np.float32(np.inf)))
        return plan.exchange(np.ones(500, np.float32)).mean.sum()

    assert virtual.results(4, program, ranks_per_node=2) == [500] * 4


def test_one_rank_elsewhere_lets_all_go_in_pairs():
    def program(comm):
        counting = FaultyComm(comm)
        DenseMean(counting, 40).exchange(np.ones(40, np.float32))
        return "Isend" in counting.calls

    assert virtual.results(3, program, ranks_per_node=2) == [True] * 3


def test_factors_go_in_pairs_too():
    def program(comm):
        counting = FaultyComm(comm)
        plan = LowRankMean(counting, LowRank(1, shapes=((8, 6),)), 48)
        counting.calls.clear()
        plan.exchange(gaussian(comm.Get_rank(), 48))
        return set(counting.calls)

    assert virtual.results(3, program) == [{"Allgather", "Isend"}] * 3


def test_a_communicator_without_messages_between_two_ranks_keeps_its_way():
    class Collectives(FaultyComm):
        def __getattr__(self, name):
            if name in ("Isend", "Irecv"):
                raise AttributeError(name)
            return super().__getattr__(name)

    def program(comm):
        counting = Collectives(comm)
        DenseMean(counting, 40).exchange(np.ones(40, np.float32))
        return "Alltoallv" in counting.calls

    assert virtual.results(2, program) == [True] * 2


class Watched(FaultyComm):
    """Notes whom messages go to and come from, and how many are under way."""

    def __init__(self, comm):
        super().__init__(comm)
        self.partners, self.open, self.most = [], 0, 0

    def _noting(self, request):
        self.open += 1
        self.most = max(self.most, self.open)
        watched = self

        class Noting:
            def Wait(self):
                request.Wait()
                watched.open -= 1

        return Noting()

    def Isend(self, array, dest, tag):
        self.partners.append(dest)
        return self._noting(self.comm.Isend(array, dest, tag))

    def Irecv(self, array, source, tag):
        return self._noting(self.comm.Irecv(array, source, tag))


def test_each_step_has_other_pairs_and_few_messages_are_under_way(monkeypatch):
    """In every step all receive from one rank; what goes out of a block travels with what comes of the next but one."""
    monkeypatch.setattr(pairwise, "MESSAGE_NBYTES", 16)
    n, d = 5, 5 * 4 * 6  # six blocks

    def program(comm):
        watched = Watched(comm)
        mean = pairwise.PairwiseMean(watched, d, DenseMean(comm, d)._kernels)
        mean.form(np.ones(d, np.float32), np.float32(1), np.empty(d, np.float32))
        assert not watched.open
        return [(to - comm.Get_rank()) % n for to in watched.partners], watched.most

    one_way = [1, 2, 3, 4]
    both = [step for step in one_way for _ in range(2)]
    for steps, most in virtual.results(n, program):
        assert steps == 2 * one_way + 4 * both + 2 * one_way
        assert most == 2 * pairwise.UNDER_WAY


class Links(FaultyComm):
    """Counts the bytes that this rank sends to all others alike, and to each by itself."""

    def __init__(self, comm):
        super().__init__(comm)
        self.alike, self.apart = 0, np.zeros(comm.Get_size(), int)

    def __getattr__(self, name):
        found = super().__getattr__(name)
        if name not in ("Allgather", "Allgatherv", "Alltoall", "Alltoallv", "Isend"):
            return found

        def call(send, *others):
            if name == "Isend":
                self.apart[others[0]] += send.nbytes
            elif name == "Alltoallv":
                self.apart += send[0].itemsize * np.asarray(send[1][0])
            elif name == "Alltoall":
                self.apart += send.nbytes // self.comm.Get_size()
            else:
                self.alike += send.nbytes
            return found(send, *others)

        return call


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("n", "s"), [(1, 1), (4, 1), (6, 2), (5, 3), (4, 4)])
def test_bytes_on_the_link_of_a_node(plan, n, s, monkeypatch):
    """Counted: what comes to a node, what is gathered once; the last node has what ranks are left."""
    monkeypatch.setattr(pairwise, "MESSAGE_NBYTES", 256)

    def program(comm):
        links = Links(comm)
        made = PLANS[plan](links, 1001, np.float32)
        links.alike, links.apart[:] = 0, 0
        made.exchange(gaussian(comm.Get_rank(), made.own_d))
        link = made.link_traffic
        assert link.dense_nbytes == 2 * (-(-n // s) - 1) * 4004 // -(-n // s)
        return links.alike, links.apart, link.nbytes, made.nodes

    rows = virtual.results(n, program, ranks_per_node=s)
    on = np.array(rows[0][3].numbers)
    coming = [sum(rows[r][0] + int(rows[r][1][on == node].sum()) for r in np.flatnonzero(on != node))
              for node in range(on.max() + 1)]
    assert {said for *_, said, _ in rows} == {max(coming)}


def test_sixteen_ranks_on_four_nodes_send_what_counters_of_interfaces_have_shown():
    """2e6 entries, TopK 1 % in bf16: 741 kB on a link for the gather, 241 kB in two phases, with TCP's headers."""

    def program(comm):
        compressor = TopK(0.01, values=Quantize("bf16"))
        two = TwoPhaseMean(comm, compressor, 2_000_000, reply=compressor)
        return [(plan.traffic.sent_nbytes, plan.link_traffic.nbytes)
                for plan in (GatherMean(comm, compressor, 2_000_000), two)]

    (gathered, of_node), (scattered, of_two) = virtual.results(16, program, ranks_per_node=4)[0]
    assert 4 * gathered == pytest.approx(3_694_000, rel=0.01)
    assert of_node == pytest.approx(738_900, rel=0.01)
    assert 4 * scattered == pytest.approx(466_000, rel=0.01)
    assert of_two == pytest.approx(232_800, rel=0.01)


def test_memory_of_many_ranks_is_limited(monkeypatch):
    monkeypatch.setattr(pairwise, "ARRIVING_NBYTES", 1 << 10)
    for plan in virtual.results(16, lambda comm: DenseMean(comm, 10_000)):
        assert plan._rank_order._pairs._arrived.nbytes <= 1 << 10


def test_memory_stays_while_messages_are_under_way_after_an_error(monkeypatch):
    kept = []
    monkeypatch.setattr(pairwise, "took_off", lambda owner, request: kept.append((owner._memory, request)))
    vectors = [np.ones(100, np.float32) for _ in range(2)]

    def program(comm):
        faulty = FaultyComm(comm)
        plan = DenseMean(faulty, 100)
        plan.exchange(vectors[comm.Get_rank()])
        assert not kept
        faulty.arm("raise" if comm.Get_rank() else "", 2)  # after the first word: its second message
        with pytest.raises((CommunicationError, DeadlockError)):
            plan.exchange(vectors[comm.Get_rank()])

    virtual.results(2, program)
    for x in vectors:
        assert any(np.shares_memory(x, memory[0]) for memory, _ in kept)
    assert not all(request.Test() for _, request in kept)


def test_messages_of_virtual_ranks_come_in_order_and_are_copies():
    def program(comm):
        if comm.Get_rank():
            x = np.arange(3.0)
            comm.Isend(x, 0).Wait()
            comm.Isend(x + 10, 0, 7).Wait()
            x += 1
            comm.Isend(x, 0).Wait()
            return None
        arrays = np.empty((3, 3))
        requests = [comm.Irecv(row, 1, tag) for row, tag in zip(arrays, (0, 0, 7), strict=True)]
        for request in requests:
            request.Wait()
        return arrays[:, 0].tolist()

    assert virtual.results(2, program)[0] == [0, 1, 10]


def test_who_expects_a_message_that_never_comes_fails():
    def program(comm):
        if comm.Get_rank() < 2:
            comm.Irecv(np.empty(1), 2).Wait()

    first, second, ended = virtual.run(3, program)
    assert ended is None
    for error in (first, second):
        assert isinstance(error, DeadlockError)
        assert "rank 0 in Irecv, rank 1 in Irecv" in str(error)
