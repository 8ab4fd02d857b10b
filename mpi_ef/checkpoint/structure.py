"""The HDF5 structure of a rank's file: made in memory without the data, and checked before data are read."""

import io
import os
from typing import Any

import h5py
from h5py import h5d, h5o, h5p, h5s

from mpi_ef.errors import briefly

from .dtypes import DTYPES, hdf5_type

__all__ = ["INDEX", "Places", "check_structure", "make_structure"]

INDEX = "index"
"""Name of the dataset that holds the JSON index."""

Places = dict[str, tuple[int, int]]
"""Of every dataset: where its bytes begin in the file, and how many they are."""

_PAGE = 4096
_LARGE = 1 << 16  # datasets from this size on begin at a page
_READ = 1 << 20  # bytes that HDF5 may read of a file: many times what the structure of one takes


class _Writes(io.RawIOBase):
    """A file in memory that keeps what was written, and where: other bytes, of which there may be many, are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, bytes]] = []
        self.size = self._place = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = offset + (0, self._place, self.size)[whence]
        return self._place

    def write(self, data: Any, /) -> int:
        self.written.append((self._place, bytes(data)))
        count = len(self.written[-1][1])
        self._place += count
        self.size = max(self.size, self._place)
        return count

    def readinto(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        view[:] = bytes(view.nbytes)
        for place, written in self.written:
            start, stop = max(place, self._place), min(place + len(written), self._place + view.nbytes)
            if start < stop:
                view[start - self._place : stop - self._place] = written[start - place : stop - place]
        self._place += view.nbytes
        return view.nbytes

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self._place if size is None else size
        return self.size


class _Reads(io.RawIOBase):
    """An open file of which HDF5 reads `_READ` bytes at most, wherever they lie, and nothing from any other file."""

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__()
        self._descriptor, self._size, self._place, self._left = descriptor, size, 0, _READ

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._left -= view.nbytes
        if self._left < 0:
            raise ValueError(f"its structure takes more than {_READ:,} bytes")
        done = 0
        while done < view.nbytes:
            count = os.preadv(self._descriptor, [view[done:]], self._place + done)
            if not count:
                view[done:] = bytes(view.nbytes - done)
                break
            done += count
        self._place += view.nbytes
        return view.nbytes


def make_structure(sizes: dict[str, int],
                   attributes: dict[str, str | int]) -> tuple[list[tuple[int, bytes]], int, Places]:
    """Make an HDF5 file with contiguous datasets of given sizes, without their data: what to write where, its size, places.

    HDF5 never sees the disk: a full one leaves it with files that read as zeros, or kills the process. `sizes` are the bytes
    of `INDEX` and of the buffer of every dtype, all above zero; `attributes` are for other programs.
    """
    file, places = _Writes(), Places()
    with h5py.File(file, "w", libver=("earliest", "v110"), locking=False, alignment_threshold=_LARGE,
                   alignment_interval=_PAGE) as made:
        made.attrs.update(attributes)
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_layout(h5d.CONTIGUOUS)
        creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5d.FILL_TIME_NEVER)
        for name, nbytes in sizes.items():
            dtype = "uint8" if name == INDEX else name
            space = h5s.create_simple((nbytes // DTYPES[dtype].itemsize,))
            dataset = h5d.create(made.id, name.encode(), hdf5_type(dtype), space, creation)
            places[name] = (dataset.get_offset(), nbytes)
    return [(place, written[: file.size - place]) for place, written in file.written], file.size, places


def check_structure(descriptor: int, size: int) -> Places:
    """Return where the data of an open file lie, after making sure that they lie in it and nowhere else; `ValueError` else.

    Only hard links to datasets of the root group pass, contiguous, one-dimensional, of the type that their name says,
    without filters, external files and virtual sources, inside of the file and apart from each other.
    """
    places = Places()
    with h5py.File(_Reads(descriptor, size), "r", locking=False) as file:
        group = file.id
        if len(group) > len(DTYPES) + 1:
            raise ValueError(f"it has {len(group)} links where datasets of {len(DTYPES)} dtypes are possible")
        for key in group:
            name = key.decode(errors="replace")
            if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                raise ValueError(f"{briefly(name)} is a link to somewhere else")
            if name != INDEX and name not in DTYPES:
                raise ValueError(f"{briefly(name)} is no dataset of a checkpoint")
            places[name] = _extent(h5o.open(group, key), name)
    if INDEX not in places:
        raise ValueError("it has no index")
    end = 0
    for offset, nbytes in sorted(places.values()):
        if offset < end or offset + nbytes > size:
            raise ValueError("its datasets overlap or reach beyond its end")
        end = offset + nbytes
    return places


def _extent(dataset: Any, name: str) -> tuple[int, int]:
    if not isinstance(dataset, h5d.DatasetID):
        raise ValueError(f"{briefly(name)} is no dataset")  # noqa: TRY004
    creation, space, dtype = dataset.get_create_plist(), dataset.get_space(), "uint8" if name == INDEX else name
    if creation.get_external_count():
        raise ValueError(f"{briefly(name)} lies in another file")
    if creation.get_layout() != h5d.CONTIGUOUS or creation.get_nfilters():
        raise ValueError(f"{briefly(name)} is virtual, chunked, compact or filtered")
    if not dataset.get_type().equal(hdf5_type(dtype)):
        raise ValueError(f"{briefly(name)} does not hold {dtype} values")
    if space.get_simple_extent_type() != h5s.SIMPLE or space.get_simple_extent_ndims() != 1:
        raise ValueError(f"{briefly(name)} has not one dimension")
    nbytes = space.get_simple_extent_npoints() * DTYPES[dtype].itemsize
    offset = dataset.get_offset()
    if offset is None or dataset.get_storage_size() != nbytes:
        raise ValueError(f"{briefly(name)} declares {nbytes} bytes and stores {dataset.get_storage_size()}")
    return offset, nbytes
