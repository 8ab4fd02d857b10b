"""Machine code on disk is run: what is damaged, or what somebody else may have written, is compiled again."""

import os
import pickle
import stat
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from numba.core import caching, config

from mpi_ef.kernels import _cache, _jit, select

ARGUMENTS = (3, 3.5)


def twice(x):
    return x + x


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_cache, "_warned", [])
    return tmp_path


def run(argument=3):
    """Call the function in what is a new process to Numba, and return what happened: "hit" or "miss", and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel = _jit.jit(twice)
        assert kernel(argument) == 2 * argument
        assert kernel(argument) == 2 * argument
    (how,) = [name for name, count in (("hit", kernel.stats.cache_hits), ("miss", kernel.stats.cache_misses)) if count]
    return how, [str(warning.message) for warning in caught]


def kept(folder):
    return sorted(folder.rglob("*.nbc"))


def the_file(folder):
    run()
    (file,) = kept(folder)
    return file


def test_compiled_once_and_loaded_from_then_on(folder):
    assert [run(argument)[0] for argument in ARGUMENTS] == ["miss"] * 2
    assert [run(argument) for argument in ARGUMENTS * 2] == [("hit", [])] * 4
    assert len(kept(folder)) == 2


def flipped(code, n):
    return code[:n] + bytes([code[n] ^ 64]) + code[n + 1 :]


@pytest.mark.parametrize("damage", [
    lambda code: b"", lambda code: code[:20], lambda code: code[:-1], lambda code: code + b"\0",
    lambda code: bytes(len(code)), *(lambda code, n=n: flipped(code, n * len(code) // 16) for n in range(16)),
])
def test_damaged_code_is_compiled_again_with_one_warning(folder, damage):
    """A job was killed, a disk was full, a bit has flipped: what Numba loads of it may end in any way."""
    file = the_file(folder)
    file.write_bytes(damage(file.read_bytes()))
    how, (warning,) = run()
    assert how == "miss"
    assert f"{file.parent}: {file.name} is damaged" in warning
    assert run() == ("hit", [])


def test_code_under_another_name_is_not_used(folder):
    for argument in ARGUMENTS:
        run(argument)
    first, second = kept(folder)
    first.write_bytes(second.read_bytes())
    assert sorted(run(argument)[0] for argument in ARGUMENTS) == ["hit", "miss"]


class Planted:
    def __reduce__(self):
        return exec, (f"import pathlib; pathlib.Path({str(self.mark)!r}).touch()",)


@pytest.mark.parametrize("how", ["owner", "group", "others"])
def test_code_that_others_may_have_written_is_not_run(folder, monkeypatch, how):
    """Whoever makes the folder first would have others run what lies in it."""
    file, planted = the_file(folder), Planted()
    planted.mark = folder / "mark"
    code, key = pickle.dumps(planted), []
    files = _jit.jit(twice)._cache.files
    monkeypatch.setattr(_cache._Files, "_path", lambda *arguments: key.append(arguments[1]) or file)
    run()
    file.write_bytes(files._digest(key[0], code) + code)
    if how == "owner":
        monkeypatch.setattr(_cache, "_OWNERS", {54321})
        status, refusal = folder.stat(), "belongs to user"
        monkeypatch.setattr(_cache, "refusal", lambda status, writable, asked=_cache.refusal: asked(status, writable)
                            if stat.S_ISREG(status.st_mode) else "")  # the folder is one's own
        assert _cache.refusal(status, 0o002) == ""
    else:
        file.chmod({"group": 0o664, "others": 0o646}[how])
        refusal = "may be written by others"
    what, (warning,) = run()
    assert what == "miss"
    assert refusal in warning
    assert not planted.mark.exists()


def test_that_would_have_run(folder):
    """What the test above plants is run where it can be trusted."""
    file, planted = the_file(folder), Planted()
    planted.mark = folder / "mark"
    code, files = pickle.dumps(planted), _jit.jit(twice)._cache.files
    files._path = lambda key: file
    file.write_bytes(files._digest(0, code) + code)
    files.load(0)
    assert planted.mark.exists()


@pytest.mark.parametrize("refusal", ["may be written by others", "belongs to user"])
def test_a_folder_of_others_is_not_used(folder, monkeypatch, refusal):
    file = the_file(folder)
    if refusal == "belongs to user":
        monkeypatch.setattr(_cache, "_OWNERS", {54321})
    else:
        file.parent.chmod(0o1777)
    what, (warning,) = run()
    assert what == "miss"
    assert f"{file.parent}: the folder {refusal}" in warning
    file.unlink()
    assert run() == ("miss", [])
    assert kept(folder) == []
    said = []
    monkeypatch.setattr(_jit.machine_code, "announce", said.append)
    run()
    assert said == [""]


def pipe(path):
    os.mkfifo(path)


def link(path):
    path.with_suffix(".elsewhere").symlink_to("/dev/zero")
    path.symlink_to(path.with_suffix(".elsewhere"))


@pytest.mark.parametrize("make", [pipe, link, Path.mkdir])
def test_what_is_no_file_is_not_opened(folder, make):
    """It would be waited for, or fill the memory."""
    file = the_file(folder)
    file.unlink()
    make(file)
    what, (warning,) = run()
    assert what == "miss"
    assert str(file.parent) in warning


@pytest.mark.parametrize("fails", [
    (Path, "replace"), (os, "fdopen"), (caching.UserProvidedCacheLocator, "ensure_cache_path"),
])
def test_a_full_disk_costs_the_cache_and_not_the_program(folder, monkeypatch, fails):
    run()  # the folder is there

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*fails, full)
    if fails[1] == "ensure_cache_path":
        monkeypatch.setattr(fails[0], "from_function", classmethod(lambda cls, *where: cls(*where)))
    what, (warning,) = run(2.5)
    assert what == "miss"
    assert "it cannot be written (No space left on device)" in warning
    assert len(kept(folder)) == 1
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [kept(folder)[0].name]


def test_what_numba_cannot_make_a_kernel_of_is_compiled_again(folder, monkeypatch):
    the_file(folder)

    def fails(*_):
        raise RuntimeError("LLVM does not parse it")

    monkeypatch.setattr(caching.CompileResultCacheImpl, "rebuild", fails)
    what, (warning,) = run()
    assert what == "miss"
    assert "RuntimeError: LLVM does not parse it" in warning


def test_files_are_ones_own(folder):
    before = os.umask(0o002)  # as where everybody has a group
    try:
        file = the_file(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_processes_may_compile_for_several_dtypes_at_the_same_time(folder):
    """Nothing is written that the other one has to know."""
    kernels = [_jit.jit(twice) for _ in ARGUMENTS]
    threads = [threading.Thread(target=kernel, args=[argument]) for kernel, argument in zip(kernels, ARGUMENTS, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run(argument)[0] for argument in ARGUMENTS] == ["hit"] * 2


def test_a_change_in_any_kernel_file_discards_cached_code(folder, monkeypatch):
    """Numba alone looks at the file of a kernel, not at those of the functions it calls."""
    assert _cache._room_stamp() == _cache._STAMP
    assert isinstance(select.select_largest._cache, _cache.MachineCodeCache)
    file = the_file(folder)
    monkeypatch.setattr(_cache, "_STAMP", b"another")
    assert not _jit.jit(twice)._cache.files.there()
    assert run() == ("miss", [])
    assert run() == ("hit", [])
    monkeypatch.undo()
    assert file.exists()


def test_recompiling_removes_what_there_is(folder):
    the_file(folder)
    kernel = _jit.jit(twice)
    kernel._cache.flush()
    assert kept(folder) == []
    assert kernel(np.float32(2)) == 4
    assert len(kept(folder)) == 1
