"""Checkpoints for tests: small ones with every dtype, and files that somebody has forged."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
from virtual import results

from mpi_ef.checkpoint import BFLOAT16, Store, open_checkpoint

NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
           "complex64", "complex128")


def any_bits(seed: int, dtype, shape) -> np.ndarray:
    """Random bits: NaNs with payloads, infinities and subnormals among them."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return (raw & 1 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


def shared(step: int = 0) -> dict[str, np.ndarray]:
    """Replicated arrays of every dtype: many elements, none, no dimension, and odd layouts in memory."""
    arrays = {f"{name} values": any_bits(step + i, name, (3, 29)) for i, name in enumerate((*NUMBERS, "bool"))}
    return arrays | {
        "bf16": any_bits(step + 90, np.uint16, (5, 7)).view(BFLOAT16),
        "empty": np.empty((3, 0, 2), np.float32),
        "nothing": np.empty(0, BFLOAT16),
        "point": np.array(step - 0.5),
        "a/../b \N{GREEK SMALL LETTER ALPHA}": any_bits(step + 91, "float32", (6, 4)).T,
        "every other": any_bits(step + 92, "float64", 50)[::2],
        "big endian": np.arange(7, dtype=">i4") + step,
    }


def own(rank: int, step: int = 0) -> dict[str, np.ndarray]:
    """Arrays of one rank; names and shapes differ."""
    return {
        "e_i": any_bits(1000 * (rank + 1) + step, "float32", 17 + 5 * rank),
        f"only of {rank}": any_bits(2000 + rank + step, "uint16", (2, rank)).view(BFLOAT16),
        "rng": any_bits(3000 * (rank + 1) + step, "uint64", 4),
    }


def documents(rank: int, step: int = 0):
    """What all ranks say, and what each says; floats that JSON must not round."""
    return {"step": step, "tree": [1, None, "ä", {"lr": 0.1 + 0.2}]}, {"rank": rank, "order": [step] * rank}


def save(folder: Path, step: int = 0, n: int = 2, **options) -> Path:
    """Save a small checkpoint from `n` virtual ranks."""

    def program(comm):
        rank, store = comm.Get_rank(), Store(folder, **options)
        document, mine = documents(rank, step)
        return store.save(comm, step, replicated=shared(step), per_rank=own(rank, step), document=document,
                          rank_document=mine)

    return results(n, program)[0]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype.newbyteorder("<") != b.dtype.newbyteorder("<"):
        return False
    return a.astype(b.dtype).tobytes() == b.tobytes()


def assert_holds(path: Path, step: int = 0, n: int = 2) -> None:
    """Read all of a checkpoint and compare it with what `save` was given."""
    found = open_checkpoint(path)
    assert (found.step, found.world_size, found.document) == (step, n, documents(0, step)[0])
    assert found.replicated_names() == {
        name: (array.shape, array.dtype.newbyteorder("<") if array.dtype != BFLOAT16 else BFLOAT16)
        for name, array in shared(step).items()
    }
    for name, array in shared(step).items():
        assert same_bits(array, found.replicated(name)), name
    for rank in range(n):
        assert found.rank_document(rank) == documents(rank, step)[1]
        assert {name: shape for name, (shape, _) in found.per_rank_names(rank).items()} == {
            name: array.shape for name, array in own(rank, step).items()
        }
        for name, array in own(rank, step).items():
            assert same_bits(array, found.per_rank(name, rank)), name


def forge(path: Path, change=lambda told: None) -> None:
    """Make checksums right again after files were changed, as an attacker would; `change` may edit the manifest."""
    told = json.loads((path / "master.json").read_text())
    for row in told["files"]:
        file = path / row["name"]
        if file.is_file():
            data, row["size"], crc32, place = file.read_bytes(), file.stat().st_size, 0, 0
            for offset, nbytes in [*row["data"], (row["size"], 0)]:
                crc32 = zlib.crc32(data[place:offset], crc32)
                place = offset + nbytes
            row["crc32"] = f"{crc32:08x}"
    change(told)
    text = json.dumps(told).encode()
    (path / "master.json").write_bytes(text)
    (path / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")
