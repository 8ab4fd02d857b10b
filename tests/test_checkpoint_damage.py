"""Files that were cut, flipped, mixed up or forged: an error, or the right data, never anything else."""

import json
import re
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from checkpoint_cases import assert_holds, forge, save
from h5py import h5d, h5p, h5s
from virtual import results, run

from mpi_ef.checkpoint import Store, open_checkpoint
from mpi_ef.checkpoint.checksum import BLOCK, checksum
from mpi_ef.errors import CheckpointError

FILES = ("rank-00000.h5", "rank-00001.h5", "master.json", "COMMIT")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), 6)


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def detected(path: Path) -> bool:
    """Read everything; what can be read must be right."""
    try:
        assert_holds(path, 6)
    except CheckpointError:
        return True
    return False


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_detected(copied, name):
    size = (copied / name).stat().st_size
    with (copied / name).open("r+b") as file:
        for length in reversed([*range(min(4096, size)), *range(max(size - 1024, 4096), size)]):
            file.truncate(length)
            assert detected(copied), length


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_never_give_wrong_data(copied, name):
    whole = (copied / name).read_bytes()
    rng, found = np.random.default_rng(len(whole)), 0
    for bit in rng.integers(0, 8 * len(whole), 200):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (copied / name).write_bytes(data)
        found += detected(copied)
    assert found > 180  # the others hit the space between two arrays


@pytest.mark.parametrize("name", FILES)
def test_bytes_that_were_changed_added_or_moved(copied, name):
    whole = (copied / name).read_bytes()
    rng = np.random.default_rng(len(whole))
    for _ in range(60):
        data = bytearray(whole)
        a, b, count = (int(x) for x in rng.integers(1, len(data), 3))
        match rng.integers(0, 4):
            case 0:
                data[a : a + count] = rng.bytes(len(data[a : a + count]))
            case 1:
                data[a:a] = data[b : b + count]
            case 2:
                data[a : a + count] = bytes(len(data[a : a + count]))  # what a full disk leaves
            case 3:
                data[a:], data[:a] = data[: len(data) - a], data[len(data) - a :]
        (copied / name).write_bytes(data)
        detected(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_a_folder(copied, name):
    (copied / name).unlink()
    assert detected(copied)
    (copied / name).mkdir()
    assert detected(copied)


def test_files_of_two_checkpoints_do_not_mix(copied, tmp_path):
    other = save(tmp_path / "other", 6)  # the same step of another run
    shutil.copy(other / "rank-00001.h5", copied)
    with pytest.raises(CheckpointError, match="structure is not what was written"):
        open_checkpoint(copied).rank_document(1)
    forge(copied)
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        open_checkpoint(copied).rank_document(1)


def test_a_forged_structure_gives_clean_errors(copied):
    """Checksums made right again: now HDF5 and the index are looked at."""
    manifest, whole = (copied / "master.json").read_bytes(), (copied / "rank-00001.h5").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.choice([0, 1, 255, int(rng.integers(256))])
        (copied / "rank-00001.h5").write_bytes(data)
        (copied / "master.json").write_bytes(manifest)
        forge(copied)
        try:
            found = open_checkpoint(copied)
            for name in found.replicated_names():
                found.replicated(name)
            for name in found.per_rank_names(1):
                found.per_rank(name, 1)
        except CheckpointError:
            refused += 1
    assert refused > 50


def dataset(file, name, dtype=np.uint8, shape=(8,), maximum=None, prepare=lambda creation: None):
    """Create a dataset, wrong in one way."""
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    prepare(creation)
    if name in file:
        del file[name]
    h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), h5s.create_simple(shape, maximum), creation)


def external_link(file):
    file["uint8"] = h5py.ExternalLink("/etc/hostname", "/x")


def soft_link(file):
    file["uint8"] = h5py.SoftLink("/index")


def external_storage(file):
    dataset(file, "uint8", prepare=lambda c: c.set_external(b"/etc/hostname", 0, 8))


def virtual(file):
    layout = h5py.VirtualLayout(shape=(8,), dtype="u1")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", shape=(8,))
    file.create_virtual_dataset("uint8", layout)


def chunked(file):
    dataset(file, "uint8", prepare=lambda c: c.set_chunk((4,)))


def filtered(file):
    file.create_dataset("uint8", data=np.zeros(8, np.uint8), compression="gzip")


def compact(file):
    dataset(file, "uint8", prepare=lambda c: c.set_layout(h5d.COMPACT))


def shape_bomb(file):
    dataset(file, "uint8", shape=(1 << 50,), prepare=lambda c: c.set_alloc_time(h5d.ALLOC_TIME_LATE))


def index_bomb(file):
    dataset(file, "index", shape=(1 << 50,), prepare=lambda c: c.set_alloc_time(h5d.ALLOC_TIME_LATE))


def wrong_type(file):
    dataset(file, "uint8", dtype=np.float32)


def text(file):
    file.create_dataset("uint8", data=["a", "b"], dtype=h5py.string_dtype())


def reference(file):
    file.create_dataset("uint8", data=file.ref, dtype=h5py.ref_dtype)


def two_dimensions(file):
    dataset(file, "uint8", shape=(2, 4))


def unknown_name(file):
    dataset(file, "pickle")


def group(file):
    file.create_group("uint8")


def named_type(file):
    file["uint8"] = np.dtype("u1")


def many(file):
    for i in range(40):
        dataset(file, f"x{i}")


def no_index(file):
    del file["index"]


def same_twice(file):
    file["uint8"] = file["index"]


HOSTILE = (external_link, soft_link, external_storage, virtual, chunked, filtered, compact, shape_bomb, index_bomb,
           wrong_type, text, reference, two_dimensions, unknown_name, group, named_type, many, no_index,
           same_twice)


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_hostile_structures_are_refused(copied, attack):
    with h5py.File(copied / "rank-00001.h5", "r+") as file:
        del file["uint8"]
        attack(file)
        offsets = sorted(
            (one.get_offset(), one.get_storage_size())
            for name in file
            if name != "index" and isinstance(one := _dataset(file, name), h5d.DatasetID) and one.get_offset()
        )
    forge(copied, lambda told: told["files"][1].update(data=[pair for pair in offsets if pair[1]]))
    forge(copied)
    with pytest.raises(CheckpointError, match="refused") as caught:
        open_checkpoint(copied).replicated_names()
    assert not caught.value.damaged
    assert "\n" not in str(caught.value)


def _dataset(file, name):
    try:
        return h5py.h5o.open(file.id, name.encode())
    except KeyError:
        return None


def edit_index(path: Path, change) -> None:
    """Change the index of rank 1, keeping its length."""
    with h5py.File(path / "rank-00001.h5", "r+") as file:
        raw = file["index"][:].tobytes()
        told = json.loads(raw)
        change(told)
        new = json.dumps(told, separators=(",", ":")).encode()
        assert len(new) <= len(raw)
        file["index"][:] = np.frombuffer(new.ljust(len(raw)), np.uint8)
    forge(path)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1 << 40}, {"offset": -8}, {"offset": 3}, {"nbytes": 1 << 40}, {"nbytes": -1}, {"nbytes": 1.0},
        {"begin": 1 << 40}, {"shape": [1 << 62, 1 << 62]}, {"shape": [-1]}, {"shape": "x"}, {"shape": [True]},
        {"shape": [1] * 80}, {"dtype": "object"}, {"dtype": "int64"}, {"kind": "x"}, {"crc32": "zzzzzzzz"},
        {"crc32": 5}, {"name": 5}, {"new": 1}, {"shape": [0]}, {"shape": []}, {"offset": 0, "dtype": "float32"},
    ],
    ids=str,
)
def test_hostile_indices_are_refused(copied, change):
    def edit(told):
        row = next(row for row in told["arrays"] if row["name"] == "int16 values")
        row.update(change)

    edit_index(copied, edit)
    with pytest.raises(CheckpointError):
        open_checkpoint(copied).replicated("int16 values")


def test_one_buffer_does_not_make_many_arrays(copied):
    def edit(told):
        rows = [row for row in told["arrays"] if row["name"] == "int16 values"]
        told["arrays"] = rows * 3

    edit_index(copied, edit)
    with pytest.raises(CheckpointError, match="over another array"):
        open_checkpoint(copied).replicated_names()


@pytest.mark.parametrize("told", [[], None, {"arrays": 3}, {"arrays": [[]]}, "x"], ids=str)
def test_indices_of_another_shape_are_refused(copied, told):
    def edit(real):
        if isinstance(told, dict):
            real.update(told)

    edit_index(copied, edit)
    if not isinstance(told, dict):
        with h5py.File(copied / "rank-00001.h5", "r+") as file:
            file["index"][:] = np.frombuffer(json.dumps(told).encode().ljust(file["index"].size), np.uint8)
        forge(copied)
    with pytest.raises(CheckpointError):
        open_checkpoint(copied).rank_document(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["files"][0].update(name="../../step/rank-00000.h5"),
        lambda told: told["files"][0].update(name="/etc/passwd"),
        lambda told: told["files"][0].update(name="rank-00001.h5"),
        lambda told: told["files"][0].update(name=None),
        lambda told: told["files"][0].update(size=-1),
        lambda told: told["files"][0].update(size="9"),
        lambda told: told["files"][0].update(data=[[0, 1 << 60]]),
        lambda told: told["files"][0].update(data=[[5, 5], [0, 5]]),
        lambda told: told["files"][0].update(data=[[0]]),
        lambda told: told["files"][0].update(data=3),
        lambda told: told["files"][0].update(crc32=None),
        lambda told: told["files"].append(told["files"][0]),
        lambda told: told.update(files=[]),
        lambda told: told.update(files=5),
        lambda told: told.update(world_size=3),
        lambda told: told.update(step="6"),
        lambda told: told.update(step=-6),
        lambda told: told.update(min_reader=None),
        lambda told: told.update(min_reader=0),
        lambda told: told.update(format="safetensors"),
        lambda told: told.update(written_by=[1]),
        lambda told: told.pop("document"),
        lambda told: told.clear(),
    ],
)
def test_hostile_manifests_are_refused(copied, change):
    forge(copied, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(copied)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_nested_without_end(copied):
    forge(copied, lambda told: told.update(document=0))
    text = (copied / "master.json").read_text().replace('"document": 0', '"document": ' + "[" * 100_000)
    (copied / "master.json").write_text(text)
    import hashlib

    (copied / "COMMIT").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    with pytest.raises(CheckpointError):
        open_checkpoint(copied)


def test_a_newer_version_is_not_passed_over(copied):
    """Going on from an older checkpoint, without a word, would be worse than an error."""
    save(copied.parent, 5)
    forge(copied, lambda told: told.update(version=4, min_reader=3))
    for error in run(2, lambda comm: Store(copied.parent).newest(comm)):
        assert isinstance(error, CheckpointError)
        assert "it needs a reader of version 3, and this one is version 2" in str(error)
    assert not (copied / "BAD").exists()
    (copied / "BAD").touch()
    assert results(2, lambda comm: Store(copied.parent).newest(comm))[0].step == 5


def test_a_newer_version_that_old_readers_can_read(copied):
    forge(copied, lambda told: told.update(version=3, more="x"))
    assert_holds(copied, 6)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", FILES)
def test_damaged_ones_are_marked_and_passed_over(copied, name, n):
    """The fault is in a rank's share, wherever that is read."""
    save(copied.parent, 5)
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 16
    (copied / name).write_bytes(data)
    found = results(n, lambda comm: Store(copied.parent).newest(comm))
    assert [checkpoint.step for checkpoint in found] == [5] * n
    reason = (copied / "BAD").read_text()
    assert name in reason
    assert Store(copied.parent).steps() == [5]
    for error in run(n, lambda comm: Store(copied.parent).at(comm, 6)):
        assert isinstance(error, CheckpointError)
        assert name in str(error)
        assert "\n" not in str(error)
    save(copied.parent, 6)  # what was damaged is replaced
    assert results(n, lambda comm: Store(copied.parent).newest(comm))[0].step == 6


def test_all_damaged(copied):
    """A run must not start from nothing as if there had been none."""
    (copied / "rank-00001.h5").unlink()
    for error in run(2, lambda comm: Store(copied.parent).newest(comm)):
        assert "of 1 checkpoints none is whole" in str(error)


def test_at_reads_everything(copied):
    data = bytearray((copied / "rank-00001.h5").read_bytes())
    data[open_checkpoint(copied)._manifest.files[1].data[0][0]] ^= 1
    (copied / "rank-00001.h5").write_bytes(data)
    for error in run(2, lambda comm: Store(copied.parent).at(comm, 6)):
        assert isinstance(error, CheckpointError)
        assert error.damaged
        assert error.everywhere
        assert "are not those that were written" in str(error)


def test_verify_names_every_array_that_is_damaged(copied):
    found = open_checkpoint(copied)
    starts = [offset for offset, _ in found._manifest.files[1].data]
    data = bytearray((copied / "rank-00001.h5").read_bytes())
    for start in starts[:2]:
        data[start] ^= 1
    (copied / "rank-00001.h5").write_bytes(data)
    problems = open_checkpoint(copied).verify()
    assert len(problems) == 2
    assert all(problem.startswith("rank-00001.h5: the bytes of ") for problem in problems)


def test_what_changes_after_verification_is_noticed(copied):
    found = open_checkpoint(copied)
    assert found.verify() == []
    place = found._manifest.files[1].data[0][0]
    with (copied / "rank-00001.h5").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    problems = []
    for read in [lambda name=name: found.per_rank(name, 1) for name in found.per_rank_names(1)] + [
        lambda name=name: found.replicated(name) for name in found.replicated_names()
    ]:
        try:
            read()
        except CheckpointError as error:
            problems.append(str(error))
    assert len(problems) == 1
    assert "not those that were written" in problems[0]


def test_a_file_that_cannot_be_read_now_is_not_marked(copied, monkeypatch):
    """Another node, another time: it may be readable again."""
    save(copied.parent, 5)
    import os

    real = os.preadv

    def broken(descriptor, *rest):
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith("step-00000006/rank-00001.h5"):
            raise OSError(116, "Stale file handle")
        return real(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", broken)
    for error in run(2, lambda comm: Store(copied.parent).newest(comm)):
        assert isinstance(error, CheckpointError)
        assert "Stale file handle" in str(error)
    monkeypatch.undo()
    assert results(2, lambda comm: Store(copied.parent).newest(comm))[0].step == 6


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK - 8, BLOCK, BLOCK + 1, 3 * BLOCK + 24])
def test_the_checksum_is_the_documented_one(nbytes):
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    parts, whole = [], nbytes // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        words = [int.from_bytes(data[at : at + 8].tobytes(), "little") for at in range(start, start + BLOCK, 8)]
        parts += [sum(words[column::256]) for column in range(256)] + [
            sum(words[at : at + 256]) for at in range(0, 131072, 256)
        ]
    sums = b"".join((total % 2**64).to_bytes(8, "little") for total in parts)
    value = 0
    for start in range(0, nbytes, BLOCK):
        value = checksum(data[start : start + BLOCK].data, value)
    assert value == zlib.crc32(sums + data[whole:].tobytes())


def test_anybody_can_verify_a_file(copied):
    """What the index says of an array is the CRC-32 of its bytes."""
    found = open_checkpoint(copied)
    file = found._file(1)
    seen = {(extent.kind, extent.name): extent.crc32 for extent in file.extents if extent.kind == "per_rank"}
    assert len(seen) > 2
    for (_, name), crc32 in seen.items():
        assert zlib.crc32(np.ascontiguousarray(found.per_rank(name, 1)).tobytes()) == crc32, name


def test_the_checksum_sees_flips_and_what_changes_places():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, BLOCK, dtype=np.uint8)
    known = checksum(data.data)
    for _ in range(300):
        byte, bit = int(rng.integers(BLOCK)), 1 << int(rng.integers(8))
        data[byte] ^= bit
        assert checksum(data.data) != known
        data[byte] ^= bit
    for size in (8, 512, 2048, 4096, 65536):
        for _ in range(20):
            first, second = rng.choice(BLOCK // size, 2, replace=False) * size
            swapped = data.copy()
            swapped[first : first + size], swapped[second : second + size] = (
                data[second : second + size], data[first : first + size],
            )
            assert checksum(swapped.data) != known
            swapped[first : first + size] = 0  # a block that never reached the disk
            assert checksum(swapped.data) != known
    assert checksum(data.data) == known


# What is found at the second look --------------------------------------------------------------------------------------


def test_a_file_that_is_cut_between_two_looks(copied):
    """Before its size is compared again, and after."""
    path, seen, unseen = copied / "rank-00001.h5", open_checkpoint(copied), open_checkpoint(copied)
    assert seen.per_rank_names(1)
    size, cut = path.stat().st_size, seen._manifest.files[1].data[-1][0]
    with path.open("r+b") as file:
        file.truncate(cut)
    assert "it ends at byte " in " ".join(seen.verify())
    with pytest.raises(CheckpointError, match=f"it has {cut} bytes where {size} were written") as caught:
        unseen.per_rank_names(1)
    assert caught.value.damaged


def test_buffers_that_are_not_where_the_manifest_says(copied):
    forge(copied, lambda told: told["files"][1]["data"].pop())
    forge(copied)
    with pytest.raises(CheckpointError, match="its buffers are not where master.json says"):
        open_checkpoint(copied).rank_document(1)


def test_parts_that_do_not_make_one_array(copied):
    """Each of the files is as it was written."""

    def edit(told):
        row = next(row for row in told["arrays"] if row["begin"])  # which both files have a part of
        row["begin"] -= np.dtype(row["dtype"]).itemsize

    edit_index(copied, edit)
    assert list(open_checkpoint(copied).verify_files(range(2))) == []
    [problem] = open_checkpoint(copied).verify()
    assert re.search(r"the parts of '.*' do not make one array; use another checkpoint", problem)
