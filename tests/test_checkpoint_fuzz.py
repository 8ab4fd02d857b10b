"""Checkpoints that chance or a stranger has changed: every tool ends soon, in little memory, without a wrong array."""

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from checkpoint_cases import documents, own, same_bits, save, shared
from h5py import h5d, h5p, h5s
from test_checkpoint_damage import HOSTILE
from test_checkpoint_tools import Net
from virtual import results, run

from mpi_ef.checkpoint import Store, open_checkpoint
from mpi_ef.compress import TopK
from mpi_ef.data import ShardedSampler
from mpi_ef.errors import CheckpointError, MpiEfError
from mpi_ef.jobs.cli import main
from mpi_ef.optim import DistributedOptimizer
from mpi_ef.state.reshard import Snapshot
from mpi_ef.state.training import Training

FILES = ("rank-00000.h5", "rank-00001.h5", "master.json", "COMMIT")
BESIDE = ("BAD", "../RUNS", "../LOCK", "../LATEST")
MEMORY, SECONDS = 1 << 30, 20
ESCAPE = "\x1b]0;x\x07\x1b[31m"
VALUES = (None, True, False, 0, 1, -1, 6, 2**31, 2**62, 2**63, 10**400, 1e308, float("nan"), float("inf"),
          "", "x", ESCAPE, "\ud800", "\u202e", "a\nb", "../x",
          [], [0], [[0, 1]], {}, {"~": "tensor"}, {"": 0}, [None] * 9, "9" * 5000)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    """Two folders of checkpoints: one with every dtype, and one that `Training` has saved."""
    folder = tmp_path_factory.mktemp("seeds")
    save(folder / "any", 6)

    def program(comm):
        training, optimizer, scheduler = built(comm)
        for number, p in enumerate(training._model.parameters()):
            p.grad = torch.full_like(p, 0.01 * (comm.Get_rank() + number + 1))
        optimizer.step()
        scheduler.step()
        training._values["sampler"].advance()
        training._values["generator"].manual_seed(7 + comm.Get_rank())
        training.save(Store(folder / "model"), comm, 6, document={"at": (3, None), "best": float("inf")})
        return state(training, comm)

    GOOD[:] = results(2, program)
    return folder


GOOD: list[bytes] = []  # of each rank, what the training was when it was saved


def built(comm):
    """A small training with parts of every kind, as it is before its first step."""
    net = Net()
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            p.copy_(torch.linspace(-1.0, 1.0, p.numel()).reshape(p.shape) / (number + 6))
    optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), comm, TopK(0.5))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    sampler = ShardedSampler(40, comm, batch=4)
    training = Training(model=net, optimizer=optimizer, scheduler=scheduler, sampler=sampler, generator=torch.Generator())
    return training, optimizer, scheduler


def state(training, comm) -> bytes:
    """Return a hash of all that would be saved."""
    snapshot = Snapshot()
    for part in training._parts(comm).values():
        part.collect(snapshot)
    arrays = {**snapshot.arrays["replicated"], **snapshot.arrays["per rank"]}
    found = hashlib.sha256(repr((sorted(snapshot.trees.items()), sorted(snapshot.undecided().items()))).encode())
    for name, array in sorted(arrays.items()):
        found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.digest()


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """More than a gigabyte of memory is refused, 20 seconds of work are an error; nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(re.search(r"VmSize:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    before = signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(AssertionError(f"more than {SECONDS} s")))
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Mutations: each changes a checkpoint, and returns whether its checksums are wrong or untouched, so that what can be read
# has to be what was written.


def cut(rng, path):
    file = path / rng.choice(FILES)
    os.truncate(file, int(rng.integers(0, file.stat().st_size + 5000)))
    return True


def flipped(rng, path):
    file = path / rng.choice(FILES)
    data = bytearray(file.read_bytes())
    for place in rng.integers(0, len(data), rng.integers(1, 9)):
        data[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    return True


def moved(rng, path):
    """Blocks that are zero, or lie in another place, as after a power loss."""
    file = path / rng.choice(FILES)
    data = bytearray(file.read_bytes())
    a, b, count = (int(x) for x in rng.integers(0, len(data), 3))
    data[a : a + count] = bytes(len(data[a : a + count])) if rng.integers(2) else data[b : b + count]
    file.write_bytes(data)
    return True


def swapped(rng, path):
    first, second = rng.choice(FILES, 2, replace=False)
    (path / first).rename(path / "x")
    (path / second).rename(path / first)
    (path / "x").rename(path / second)
    return True


def special(rng, path):
    """No regular file, or a link, also to one with the right content."""
    file = path / rng.choice(FILES + BESIDE)
    kept = path.parent / "kept"
    if file.exists():
        file.rename(kept)
    match int(rng.integers(8)):
        case 0:
            os.mkfifo(file)
        case 1:
            file.symlink_to("/dev/zero")
        case 2:
            file.symlink_to(kept)
        case 3:
            file.symlink_to(file.name)
        case 4:
            file.mkdir()
        case 5:
            with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(file.parent):
                made.bind(file.name)
        case 6:
            file.symlink_to("/dev/tty")
        case 7:
            file.symlink_to("/proc/self/mem")
    return True


def hollow(rng, path):
    """Files that are holes, beyond what was written or before it."""
    file = path / rng.choice(FILES + BESIDE)
    size = int(rng.choice([1 << 21, 1 << 27, 6 << 30, 3 << 40]))
    file.touch()
    os.truncate(file, size)
    if file.suffix == ".h5" and rng.integers(2):
        rank = int(file.stem[-1])
        data = [[4096, size - 8192]] if rng.integers(2) else []
        forge(path, lambda told: told["files"][rank].update({"size": size} | ({"data": data} if data else {})))
    return True


def told_otherwise(rng, path):
    """Any value in the manifest, with the right checksum."""
    forge(path, lambda told: mutate(rng, told))
    return False


def nested(rng, path):
    depth = int(rng.choice([150, 300, 900, 3000, 200_000]))
    left, right = [("[", "]"), ('{"a":', "}")][int(rng.integers(2))]
    text = (path / "master.json").read_text()
    document = left * depth + "0" + right * (depth if rng.integers(2) else 0)
    commit(path, re.sub(r'"document": .*', lambda _: f'"document": {document}}}', text, flags=re.DOTALL).encode())
    return False


def indexed_otherwise(rng, path):
    """Any value in the index of a rank."""
    rank = int(rng.integers(2))

    def change(raw):
        told = json.loads(raw)
        mutate(rng, told)
        return json.dumps(told, separators=(",", ":"), ensure_ascii=bool(rng.integers(2))).encode("utf-8", "surrogatepass")

    reindex(path, rank, change)
    return False


def built_otherwise(rng, path):
    """HDF5 that was changed by HDF5."""
    rank, attack = int(rng.integers(2)), HOSTILE[int(rng.integers(len(HOSTILE)))]
    with h5py.File(path / f"rank-{rank:05d}.h5", "r+") as file:
        if "uint8" in file:
            del file["uint8"]
        attack(file)
    forge_places(path, rank)
    return False


def structured_otherwise(rng, path):
    """Bytes of HDF5's structure, with the right checksums."""
    rank = int(rng.integers(2))
    file = path / f"rank-{rank:05d}.h5"
    data, row = bytearray(file.read_bytes()), json.loads((path / "master.json").read_text())["files"][rank]
    outside = np.ones(len(data), bool)
    for offset, nbytes in row["data"]:
        outside[offset : offset + nbytes] = False
    for place in rng.choice(np.flatnonzero(outside)[:3000], int(rng.integers(1, 6))):
        data[place] = rng.choice([0, 1, 127, 255, int(rng.integers(256))])
    file.write_bytes(data)
    forge(path)
    return False


def huge(rng, path):
    """Datasets that declare terabytes, or an index of gigabytes, in a file that is a hole and has the right size."""
    rank, name = int(rng.integers(2)), str(rng.choice(["index", "float32", "uint8"]))
    nbytes = int(rng.choice([1 << 27, 9 << 30, 3 << 40]))
    with h5py.File(path / f"rank-{rank:05d}.h5", "r+") as file:
        if name in file:
            del file[name]
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5d.FILL_TIME_NEVER)
        dtype = np.dtype("u1" if name == "index" else name)
        space = h5s.create_simple((nbytes // dtype.itemsize,))
        h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, creation)
    forge_places(path, rank)

    def change(raw):
        told = json.loads(raw)
        row = {"kind": "per_rank", "name": "huge", "dtype": name, "shape": [nbytes // dtype.itemsize], "begin": 0,
               "offset": 0, "nbytes": nbytes, "crc32": "00000000"}
        told["arrays"] = [row]
        return json.dumps(told, separators=(",", ":")).encode()

    if name != "index":
        reindex(path, rank, change)
    return False


def named_otherwise(rng, path):
    """Names, marks and notes that a terminal would obey."""
    text = str(rng.choice([ESCAPE, "\u202e", "x\ny", "\x9b31m"]))
    match int(rng.integers(4)):
        case 0:
            (path / "BAD").write_text(text)
        case 1:
            (path.parent / os.fsdecode(b".tmp-step-00000009-" + text.replace("\n", "").encode() + b"\xff")).mkdir()
        case 2:
            shutil.copytree(path, path.parent / f".old-step-00000006-{text}")
        case 3:
            (path.parent / "RUNS").write_text(text)
    return True


MUTATIONS = (cut, flipped, moved, swapped, special, hollow, told_otherwise, nested, indexed_otherwise, built_otherwise,
             structured_otherwise, huge, named_otherwise)


def mutate(rng, told):
    """Change one value anywhere in a document; add or remove one."""
    while True:
        keys = list(told) if isinstance(told, dict) else list(range(len(told)))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(told[key], dict | list) and rng.integers(5):
            told = told[key]
            continue
        match int(rng.integers(8)):
            case 0:
                del told[key]
            case 1 if isinstance(told, dict):
                told[VALUES[int(rng.integers(14, 21))]] = told[key]
            case _:
                told[key] = VALUES[int(rng.integers(len(VALUES)))]
        return


def commit(path, text):
    (path / "master.json").write_bytes(text)
    (path / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")


def forge(path, change=lambda told: None):
    """Make sizes and checksums right again, without reading holes."""
    told = json.loads((path / "master.json").read_text())
    for row in told["files"]:
        with (path / row["name"]).open("rb") as file:
            row["size"], crc32, place = os.fstat(file.fileno()).st_size, 0, 0
            for offset, nbytes in [*row["data"], (row["size"], 0)]:
                file.seek(place)
                crc32 = zlib.crc32(file.read(min(offset - place, 1 << 20)), crc32)
                place = offset + nbytes
            row["crc32"] = f"{crc32:08x}"
    change(told)
    commit(path, json.dumps(told).encode())


def forge_places(path, rank):
    """Let the manifest say where the datasets lie."""
    places = []
    with h5py.File(path / f"rank-{rank:05d}.h5", "r") as file:
        for name in file:
            if name == "index" or file.get(name, getlink=True).__class__ is not h5py.HardLink:
                continue
            one = h5py.h5o.open(file.id, name.encode())
            if isinstance(one, h5d.DatasetID) and one.get_offset() and one.get_storage_size():
                places.append([one.get_offset(), one.get_storage_size()])

    forge(path, lambda told: told["files"][rank].update(data=sorted(places)))
    forge(path)


def reindex(path, rank, change):
    """Write another index, as long as the old one or shorter."""
    with h5py.File(path / f"rank-{rank:05d}.h5", "r+") as file:
        raw = file["index"][:].tobytes()
        new = change(raw)[: len(raw)]
        file["index"][:] = np.frombuffer(new.ljust(len(raw)), np.uint8)
    forge(path)


# What has to hold -------------------------------------------------------------------------------------------------------


def call(*arguments):
    """Run a tool; return its status, and what it has printed as results and as errors."""
    said, error, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        try:
            main(["checkpoint", *map(str, arguments)])
        except SystemExit as ended:
            status = ended.code or 0
    return status, said.getvalue(), error.getvalue()


def check_said(status, text, error, name):
    assert status in (0, 1, 2), (name, status, text)
    bad = [line for line in (text + error).split("\n") if not line.isprintable()]
    assert not bad, (name, bad[:3])
    assert not re.search(r"MemoryError|enough memory|Unable to allocate|Traceback", text + error), (name, text, error)
    assert error.count("\n") == (status == 2), (name, error)
    assert not error or error.startswith("mpi-ef: "), (name, error)


def check_content(path, name, untouched):
    """What a checkpoint of `save` gives is what it was given, as long as nobody has forged checksums."""
    try:
        found = open_checkpoint(path)
    except CheckpointError:
        return
    wanted = {"replicated": shared(6)}
    for rank in range(min(2, found.world_size)):
        with contextlib.suppress(CheckpointError):
            assert not untouched or found.rank_document(rank) == documents(rank, 6)[1]
            wanted[rank] = own(rank, 6)
            for array in list(found.per_rank_names(rank)):
                with contextlib.suppress(CheckpointError):
                    value = found.per_rank(array, rank)
                    assert not untouched or same_bits(wanted[rank][array], value), (name, array)
    with contextlib.suppress(CheckpointError):
        for array in list(found.replicated_names()):
            with contextlib.suppress(CheckpointError):
                value = found.replicated(array)
                assert not untouched or same_bits(wanted["replicated"][array], value), (name, array)


def check_resume(folder, name, untouched):
    """A training goes on from where it was saved, or nothing of it is changed, on all ranks."""

    def program(comm):
        training, *_ = built(comm)
        comm.allgather(None)  # threads share the generators that the building draws from
        before = state(training, comm)
        try:
            outcome = training.resume(Store(folder), comm)
        except MpiEfError as error:
            outcome = error
        return outcome, state(training, comm) == before, state(training, comm)

    for rank, (outcome, unchanged, now) in enumerate(results(2, program)):
        if outcome == 6:
            assert not untouched or now == GOOD[rank], f"{name}: it is another training"
            continue
        assert outcome == 0 or isinstance(outcome, MpiEfError), (name, outcome)
        assert unchanged, f"{name}: rank {rank} was changed: {outcome}"
        check_said(2, "", f"mpi-ef: {outcome if isinstance(outcome, Exception) else ''}\n", f"{name}: resume")


def survive(seeds, folder, number):
    """Make mutation `number` of one of the seeds, and let all tools look at it."""
    rng = np.random.default_rng(number)
    mutation, kind = MUTATIONS[number % len(MUTATIONS)], ("any", "model")[number // len(MUTATIONS) % 2]
    name, around = f"{number}: {mutation.__name__} of {kind}", folder / str(number)
    shutil.copytree(seeds / kind, around, symlinks=True)
    path = around / "step-00000006"
    untouched = mutation(rng, path)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    as_json = ["--json"] * int(rng.integers(2))
    out = around / f"out.{('h5', 'safetensors')[int(rng.integers(2))]}"
    everything = ["--all"] * int(rng.integers(2)) if kind == "model" else ["--all"]
    for arguments in (["ls", around], ["verify", around], ["verify", path],
                      ["inspect", path, "--rank", int(rng.integers(2)), *["--values"] * int(rng.integers(2))],
                      ["diff", path, seeds / kind / path.name], ["diff", seeds / kind / path.name, path]):
        check_said(*call(*arguments, *as_json), f"{name}: {arguments}")
    check_said(*call("export", path, out, *everything), f"{name}: export")
    if kind == "any":
        check_content(path, name, untouched)
    if kind == "model":
        check_resume(around, name, untouched)
    for outcome in run(1, lambda comm: Store(around).newest(comm)):
        assert outcome is None or isinstance(outcome, MpiEfError) or outcome.step >= 0, (name, outcome)
        check_said(2, "", f"mpi-ef: {outcome if isinstance(outcome, Exception) else ''}\n", f"{name}: newest")
    signal.setitimer(signal.ITIMER_PROF, 0)
    shutil.rmtree(around)


@pytest.mark.parametrize("part", range(3))
def test_what_chance_or_a_stranger_has_changed(seeds, tmp_path, part):
    for number in range(52 * part, 52 * (part + 1)):  # a multiple of the mutations, twice
        survive(seeds, tmp_path, number)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(100))
def test_ten_thousand_of_them(seeds, tmp_path, part):
    for number in range(1000 + 100 * part, 1100 + 100 * part):
        survive(seeds, tmp_path, number)


@pytest.mark.exhaustive
def test_a_hollow_array_with_the_right_checksum(seeds, tmp_path):
    """As large as is still read: every tool does with it what it does with others, in a gigabyte."""
    path, nbytes = shutil.copytree(seeds / "any", tmp_path / "any") / "step-00000006", 250 << 20
    other = shutil.copytree(seeds / "any", tmp_path / "other") / "step-00000006"
    hollow_array(path, nbytes, 0)
    hollow_array(other, nbytes, 1)
    for arguments in (["ls", path.parent], ["verify", path], ["inspect", path, "--values"], ["diff", path, other],
                      ["export", path, tmp_path / "out.h5", "--all"]):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        status, text, error = call(*arguments)
        check_said(status, text, error, arguments)
        assert status == (arguments[0] == "diff"), (arguments, error)


def hollow_array(path, nbytes, value):
    """Let the first rank have an array of zeros that are not on the disk, but for one byte."""
    file = path / "rank-00000.h5"
    with h5py.File(file, "r+") as opened:
        if "uint8" in opened:
            del opened["uint8"]
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5d.FILL_TIME_NEVER)
        made = h5d.create(opened.id, b"uint8", h5py.h5t.NATIVE_UINT8, h5s.create_simple((nbytes,)), creation)
        offset = made.get_offset()
    with file.open("r+b") as opened:
        opened.truncate(max(file.stat().st_size, offset + nbytes))
        opened.seek(offset)
        opened.write(bytes([value]))
    forge_places(path, 0)
    row = {"kind": "per_rank", "name": "h", "dtype": "uint8", "shape": [nbytes], "begin": 0, "offset": 0, "nbytes": nbytes,
           "crc32": f"{zlib.crc32(bytes(nbytes - 1), zlib.crc32(bytes([value]))):08x}"}

    def change(raw):
        told = json.loads(raw)
        told["arrays"] = [*[each for each in told["arrays"] if each["dtype"] != "uint8"][1:], row]
        return json.dumps(told, separators=(",", ":")).encode()

    reindex(path, 0, change)
