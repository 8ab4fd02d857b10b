"""Let ranks that wait sleep: ``LD_PRELOAD=$(python tests/idle.py)`` for programs with more ranks than cores.

MPI libraries poll, and give way to others with sched_yield at best. A dozen processes that do nothing else take half of two
cores from those that compute (two launches of four ranks: 2.0 times as long), and on some kernels hold up the kernel's own
work for minutes. Here sched_yield sleeps for 20 microseconds. Needs a C compiler; without one nothing changes.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = "#include <time.h>\nint sched_yield(void) { struct timespec t = {0, 20000}; return nanosleep(&t, 0); }\n"


def library() -> Path | None:
    """Return the library to preload, built when it is not there; None without a C compiler."""
    path = Path(tempfile.gettempdir(), f"mpi-ef-idle-{os.getuid()}", "sched_yield.so")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.parent.stat().st_uid != os.getuid():
        return None
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", draft]
        subprocess.run(command, input=SOURCE, text=True, check=True)
        draft.replace(path)
    return path


if __name__ == "__main__":
    print(library() or "")
