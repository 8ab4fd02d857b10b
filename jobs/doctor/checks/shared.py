"""Whether all nodes see the folders of rank 0."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding, listed
from mpi_ef.jobs.doctor.registry import Context
from mpi_ef.runtime.timeouts import wait_until

__all__ = ["collect", "judge", "tokens_in"]

_SECONDS = 3.0  # a network's file system may take a moment to show a file on another node


@contextmanager
def tokens_in(folders: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Make an empty file with a new name in each folder where that is possible, for other nodes, and remove it. Local."""
    tokens: dict[str, Path] = {}
    try:
        for name, folder in folders.items():
            token = Path(folder, f".mpi-ef-doctor-{uuid.uuid4().hex}")
            with suppress(OSError):  # the check of the folder itself shows why
                token.touch()
                tokens[name] = token
        yield {name: str(token) for name, token in tokens.items()}
    finally:
        for token in tokens.values():
            token.unlink(missing_ok=True)


def collect(context: Context) -> Facts:
    """Return which of the tokens of rank 0 are there. Local."""
    tokens = {name: Path(token) for name, token in context.tokens.items()}
    wait_until(lambda: all(token.exists() for token in tokens.values()), _SECONDS, rest=0.2)
    paths = {f"{name}_path": str(token.parent) for name, token in tokens.items()}
    return {name: token.exists() for name, token in tokens.items()} | paths


def judge(ranks: Ranks) -> Findings:
    """Yield whether all nodes see the folder of runs."""
    path = ranks[0]["folder_path"]
    if blind := ranks.which(lambda one: one["folder"] is False):
        nodes = listed(one.node for one in blind)
        yield finding("folder-not-shared", [one.rank for one in blind], path=path, node=ranks[0].node, nodes=nodes)
    elif path and len(ranks) > 1:
        yield finding("folder-shared", nodes=len(ranks), path=path)
