"""`coded_map` on virtual ranks of which some are late, silent, or wrong."""

import numpy as np
import pytest
import virtual

from mpi_ef.coded import BerrutCode, CodedMap, Parity, coded_map
from mpi_ef.errors import (
    DisagreementError,
    DtypeError,
    MpiEfError,
    NonFiniteError,
    OptionError,
    PeerError,
    ShapeError,
    SilenceError,
    WrongAnswersError,
)
from mpi_ef.testing.law import same_bits

both = pytest.mark.parametrize("eager", [True, False], ids=["eager", "rendezvous"])
K = 8


def blocks(shape=(5, 4), dtype=np.float64):
    """Neighbours are alike."""
    draw = np.random.default_rng(0)
    steps = np.linspace(0, 1, K).reshape(-1, *[1] * len(shape))
    return (draw.standard_normal(shape) + steps * draw.standard_normal(shape)).astype(dtype)


def tanh(x):
    assert not x.flags.writeable
    return np.tanh(x)


def mapped(n, f=tanh, x=None, eager=True, per_rank=None, **options):
    """Return what rank 0 gets; `per_rank(comm)` returns the function of a rank."""
    x = blocks() if x is None else x

    def program(comm):
        mine = f if per_rank is None else per_rank(comm)
        return coded_map(comm, mine, x if comm.Get_rank() == 0 else None, **options)
    return virtual.results(n, program, virtual=True, eager=eager)


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_with_all_answers_it_is_f_of_the_blocks(n, dtype, eager):
    x = blocks(dtype=dtype)
    result, *others = mapped(n, x=x, eager=eager)
    assert same_bits(result.values, np.tanh(x))
    assert result.values.dtype == dtype
    assert not result.error_estimate.any()
    assert result.missing == result.wrong == result.not_finite == result.misfits == ()
    assert others == [None] * (n - 1)


@pytest.mark.parametrize(("shape", "f"), [((3,), lambda x: np.outer(x, x)), ((), lambda x: x + 1), ((0,), lambda x: x),
                                          ((700, 400), lambda x: np.concatenate([x, x], axis=1)),
                                          ((4, 2), lambda x: x.sum().astype(np.float32))])
def test_answers_may_have_any_shape(shape, f):
    x = np.asarray(blocks(shape or (1,))).reshape(K, *shape)
    result = mapped(3, f, x=x)[0]
    assert same_bits(result.values, np.array([f(block) for block in x]))


@both
def test_silent_ranks_are_gone_without(eager):
    """Ranks 3 and 5 never answer: what is missing is interpolated, and the estimate says how well."""
    def per_rank(comm):
        return lambda x: (comm.pause(1000) if comm.Get_rank() in (3, 5) else None) or np.tanh(x)

    x = blocks()
    code = BerrutCode.at_least(K, 40)
    result = mapped(11, x=x, eager=eager, per_rank=per_rank, evaluations=40, patience_seconds=2)[0]
    assert result.missing == tuple(i for i in range(40) if 1 + i % 10 in (3, 5))
    lost = [j for j, i in enumerate(code.systematic) if i in result.missing]
    assert lost
    errors = np.linalg.norm((result.values - np.tanh(x)).reshape(K, -1), axis=1) / np.linalg.norm(np.tanh(x).reshape(K, -1),
                                                                                                  axis=1)
    assert errors.max() < 0.05
    assert ((errors > 0) == (result.error_estimate > 0)).all()
    assert set(np.flatnonzero(errors)) == set(lost)
    assert (errors <= 20 * result.error_estimate + 1e-15).all()


def test_spare_answers_are_not_waited_for():
    def per_rank(comm):
        return lambda x: (comm.pause(50) if comm.Get_rank() == 3 else comm.pause(0.01)) or np.tanh(x)

    def program(comm):
        begun = comm.clock()
        result = coded_map(comm, per_rank(comm), blocks() if comm.Get_rank() == 0 else None, evaluations=24, spare=6)
        return result, comm.clock() - begun

    results = virtual.results(5, program, virtual=True)
    assert len(results[0][0].missing) == 6
    assert results[0][1] < 1
    assert results[3][1] >= 50


def test_wrong_ranks_are_named_and_not_used():
    """Each of 40 ranks computes one evaluation; 3, 18, 19 (two neighbours) and 30 are wrong."""
    draw = np.random.default_rng(1)
    noise = {rank: draw.standard_normal((5, 4)) for rank in (3, 18, 19, 30)}

    def per_rank(comm):
        return lambda x: np.tanh(x) + noise.get(comm.Get_rank(), 0.0)

    x = blocks()
    result = mapped(41, x=x, per_rank=per_rank, evaluations=40, wrong=5, sample=x[:, :3])[0]
    assert result.wrong == (2, 17, 18, 29)
    assert result.wrong_ranks == (3, 18, 19, 30)
    assert np.abs(result.values - np.tanh(x)).max() < 0.02
    none = mapped(41, x=x, evaluations=40, wrong=5, sample=x[:, :3])[0]
    assert none.wrong == ()
    code = BerrutCode.at_least(K, 40)
    known = Parity.learned(np.tanh(code.encode(x)), K)
    assert mapped(41, x=x, per_rank=per_rank, evaluations=40, wrong=5, floor=known)[0].wrong == (2, 17, 18, 29)


def test_too_many_wrong_ranks_are_an_error_and_no_result():
    def per_rank(comm):
        draw = np.random.default_rng(comm.Get_rank())
        return lambda x: np.tanh(x) + (draw.standard_normal(x.shape) if comm.Get_rank() % 3 == 0 else 0)

    def program(comm):
        x = blocks()
        if comm.Get_rank():
            return coded_map(comm, per_rank(comm), None, evaluations=40, wrong=3)
        with pytest.raises(WrongAnswersError, match="cannot be named"):
            coded_map(comm, np.tanh, x, evaluations=40, wrong=3, sample=x)
        return None

    virtual.results(41, program, virtual=True)


@pytest.mark.parametrize("bad", ["nan", "shape", "dtype"])
def test_answers_that_are_no_numbers_or_of_another_shape_are_missing_and_named(bad):
    def per_rank(comm):
        def f(x):
            if comm.Get_rank() != 2:
                return np.tanh(x)
            return {"nan": x * np.nan, "shape": x[:2], "dtype": x.astype(np.complex128)}[bad]
        return f

    x = blocks()
    result = mapped(7, x=x, per_rank=per_rank, evaluations=24)[0]
    theirs = tuple(i for i in range(24) if 1 + i % 6 == 2)
    assert (result.not_finite if bad == "nan" else result.misfits) == theirs
    assert result.missing == ()
    assert np.abs(result.values - np.tanh(x)).max() < 0.1


def test_too_few_answers_raise_and_name_who_is_silent():
    def program(comm):
        rank = comm.Get_rank()
        f = (lambda x: comm.pause(1000) or x) if rank in (1, 3) else np.tanh
        if rank:
            return coded_map(comm, f, None, patience_seconds=1, evaluations=8)
        with pytest.raises(SilenceError, match="rank 1 on node 1, rank 3 on node 3 silent for 1 s, 4 of 8 answers"):
            coded_map(comm, f, blocks(), patience_seconds=1, evaluations=8)
        return None

    virtual.results(5, program, virtual=True)


@both
def test_a_map_again_and_again_with_a_rank_that_is_late_in_one(eager):
    def program(comm):
        calls = []

        def f(x):
            calls.append(0)
            if comm.Get_rank() == 2 and len(calls) == 4:
                comm.pause(1)
            return np.tanh(x)

        with CodedMap(comm, f, K, (5, 4), np.float64, spare=8, patience_seconds=5) as coded:
            if comm.Get_rank():
                return coded.serve()
            results = []
            for scale in range(1, 7):
                results.append(coded.map(blocks() * scale))
                comm.pause(0.3)
            return results

    results = virtual.results(4, program, virtual=True, eager=eager)[0]
    for scale, result in enumerate(results, 1):
        assert np.abs(result.values - np.tanh(blocks() * scale)).max() < 0.2
    assert any(result.missing for result in results)
    assert not results[-1].error_estimate.any() or results[-1].missing


@pytest.mark.parametrize(("options", "error", "line"), [
    ({"evaluations": 0}, OptionError, "evaluations=0"), ({"decode": "best"}, OptionError, "no decoding 'best'"),
    ({"patience_seconds": -1}, OptionError, "patience_seconds=-1"), ({"spare": 24}, OptionError, "spare=24"),
    ({"kind": "bac"}, OptionError, "no kind 'bac'"), ({"wrong": -1}, OptionError, "wrong=-1"),
    ({"wrong": 2, "kind": "bacc", "floor": 1.0}, OptionError, "kind='sbacc' alone"),
    ({"f": 3}, OptionError, "f=3 cannot be called"),
    ({"spare": 17}, OptionError, "spare=17 is not a non-negative integer up to 16; as many answers as blocks"),
    ({"floor": 1.0}, MpiEfError, "wrong=0 looks for none"), ({"sample": blocks()}, MpiEfError, "wrong=0 looks for none"),
    ({"wrong": 2, "sample": blocks()[:3]}, MpiEfError, "sample: there are 3 in place of 8"),
    ({"wrong": 2, "floor": Parity.of(40, 1.0)}, MpiEfError, "parity of 40 evaluations, and here are 24"),
])
def test_what_cannot_be_is_refused_on_all_ranks(options, error, line):
    def program(comm):
        with pytest.raises(error, match=line):
            coded_map(comm, **{"f": np.tanh, "blocks": None if comm.Get_rank() else blocks()} | options)

    virtual.results(3, program)


@pytest.mark.parametrize(("x", "line"), [
    (blocks().astype(np.int64), "int64"), ([np.zeros(2), np.zeros(3)], "shape"), (np.zeros((0, 3)), "blocks=0"),
    (None, "None"), (np.ma.masked_array(blocks(), mask=False), "masked array"),
])
def test_blocks_that_cannot_be_are_refused_on_all_ranks(x, line):
    def program(comm):
        with pytest.raises(MpiEfError) as caught:
            coded_map(comm, np.tanh, None if comm.Get_rank() else x)
        return str(caught.value)

    assert all(line in said for said in virtual.results(3, program))


def test_parity_is_not_guessed():
    def program(comm):
        with pytest.raises(OptionError if comm.Get_rank() == 0 else PeerError, match="needs floor=, or sample="):
            coded_map(comm, np.tanh, None if comm.Get_rank() else blocks(), wrong=2)

    virtual.results(2, program)


def test_ranks_that_disagree_or_blocks_on_other_ranks_raise():
    def program(comm):
        rank = comm.Get_rank()
        with pytest.raises((DisagreementError, PeerError)):
            coded_map(comm, np.tanh, None if rank else blocks(), spare=rank)
        with pytest.raises((OptionError, PeerError), match="blocks are given on rank 0 alone"):
            coded_map(comm, np.tanh, blocks())

    virtual.results(2, program)


def test_misuse_of_the_object():
    def program(comm):
        coded = CodedMap(comm, np.tanh, K, (5, 4), np.float64)
        if comm.Get_rank():
            with pytest.raises(OptionError, match="is rank 0's"):
                coded.map(blocks())
            return coded.serve()
        with pytest.raises(OptionError, match=r"serve\(\) is that of the other ranks"):
            coded.serve()
        with pytest.raises(ShapeError, match="it was built for float64 of shape"):
            coded.map(blocks((2,)))
        with pytest.raises(DtypeError):
            coded.map(blocks().astype(int))
        coded.close()
        with pytest.raises(OptionError, match="before close"):
            coded.map(blocks())
        return None

    virtual.results(2, program)


def test_a_rank_whose_answer_a_map_has_not_waited_for_to_the_end_is_free_again():
    """The first map ends with the short answer of rank 1, when one piece of four of that of rank 2 is here."""
    def program(comm):
        calls = []

        def f(x):
            calls.append(0)
            if comm.Get_rank() == 1 and len(calls) > 1:
                comm.pause(1000)
            comm.pause(1e-3)  # both answers come at once
            return np.full(1 if comm.Get_rank() == 1 else 450_000, x[0])

        with CodedMap(comm, f, 1, (1,), np.float64, spare=2, patience_seconds=5) as coded:
            return [coded.map([np.full(1, value)]).values[0, -1] for value in (1.0, 2.0)] if comm.Get_rank() == 0 else None

    assert virtual.results(3, program, virtual=True, eager=True)[0] == [1.0, 2.0]


def test_patience_begins_again_with_all_that_comes():
    x = blocks()
    result = mapped(3, x=x, per_rank=lambda comm: lambda u: comm.pause(1) or np.tanh(u), patience_seconds=2)[0]
    assert result.missing == ()
    assert same_bits(result.values, np.tanh(x))


@both
def test_a_rank_that_was_late_is_no_missing_one_though_rank_0_looks_later_than_patience(eager):
    def program(comm):
        def f(x):
            comm.pause(1 if comm.Get_rank() == 2 else 0.01)
            return np.full(300_000, x[0])  # three pieces

        coded = CodedMap(comm, f, 1, (1,), np.float64, spare=2, patience_seconds=2)
        with coded:
            if comm.Get_rank() == 0:
                coded.map([np.zeros(1)])
        if comm.Get_rank():
            return coded._worker.settle()
        comm.pause(10)
        coded._server.settle()
        return coded._server.ended

    assert virtual.results(3, program, virtual=True, eager=eager)[0] == {1, 2}


@pytest.mark.parametrize("n", [1, 3])
def test_f_may_return_the_same_memory_every_time(n):
    def per_rank(comm):
        mine = np.zeros((5, 4))
        return lambda x: np.tanh(x, out=mine[: len(x), : x.shape[1]])

    x = blocks()
    result = mapped(n, x=x, per_rank=per_rank, evaluations=40, wrong=2, sample=x[:, :, :3])[0]
    assert same_bits(result.values, np.tanh(x))
    assert result.wrong == ()


def test_an_error_in_the_sample_lets_the_others_end():
    def program(comm):
        if comm.Get_rank():
            return coded_map(comm, np.tanh, None, wrong=2)
        with pytest.raises(ZeroDivisionError) as caught:  # and is kept, with all that belongs to it
            coded_map(comm, lambda _: 1 / 0, blocks(), wrong=2, sample=blocks())
        return caught

    assert virtual.results(3, program, virtual=True)[1:] == [None, None]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("f", "line"), [
    (lambda x: (x > 0).astype(int), "f returns int64"), (lambda _: None, "f returns object"),
    (lambda x: x + 1j, "f returns complex128"), (lambda x: x * np.nan, "24 of 24 answers are here, 24 of them with NaN"),
    (lambda x: np.zeros(1 + int(abs(x[0, 0]) * 1e6) % 13), "blocks need as many that are neither"),
])
def test_answers_that_no_block_is_made_of_are_an_error_that_says_what_they_are(f, line, n):
    def program(comm):
        if comm.Get_rank():
            return coded_map(comm, f, None)
        with pytest.raises(MpiEfError, match=line):
            coded_map(comm, f, blocks())
        return None

    virtual.results(n, program, virtual=True)


@pytest.mark.parametrize(("f", "line"), [
    (lambda x: np.ma.masked_less(x, 0), "CodedMap: f has returned a masked array"),
    (lambda x: (x, x[1:]), "CodedMap: f has returned .* of which no array can be made")])
def test_answers_that_are_no_arrays_are_told_where_f_is_called(f, line):
    def program(comm):
        with pytest.raises(MpiEfError, match=line if comm.Get_rank() else "silent for 0.5 s"):
            coded_map(comm, f, None if comm.Get_rank() else blocks(), patience_seconds=0.5)

    virtual.results(2, program, virtual=True)
    with pytest.raises(DtypeError, match=line):
        virtual.results(1, lambda comm: coded_map(comm, f, blocks()))


def test_blocks_may_be_made_as_they_are_read():
    x = blocks()
    assert same_bits(mapped(3, x=(block for block in x))[0].values, np.tanh(x))


def test_blocks_with_nan_are_refused():
    """Their neighbours would be taken for them."""
    def program(comm):
        x = blocks()
        x[2, 0, 0] = np.nan
        if comm.Get_rank():
            return coded_map(comm, np.tanh, None)
        with pytest.raises(NonFiniteError, match=r"blocks \[2\] have NaN or Inf"):
            coded_map(comm, np.tanh, x)
        return None

    virtual.results(2, program)
