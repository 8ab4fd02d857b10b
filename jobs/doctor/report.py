"""What the doctor was asked, and what it has found."""

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mpi_ef
from mpi_ef.errors import ConfigError
from mpi_ef.jobs.doctor import checks
from mpi_ef.jobs.doctor.finding import Finding, Spot, document, page, status_of
from mpi_ef.jobs.options import option

__all__ = ["DoctorConfig", "Report", "width_here"]


@dataclass(frozen=True)
class DoctorConfig:
    """Options of the doctor; every field is a flag."""

    out: Path = option(Path("runs"), "folder that runs write to; what checkpoints need is tried there")
    warmup: bool = option(False, "compile the kernels: one rank of each node first, then the others load them")
    json: bool = option(False, "print all findings as JSON")
    patience: float = option(60.0, "seconds after which a check that does not come back counts as hanging")

    def __post_init__(self) -> None:
        if not self.patience > 0:
            raise ConfigError(f"patience={self.patience} is not positive; take for example 60")


class Report:
    """What is found, and printing it once.

    Parameters
    ----------
    config : DoctorConfig
    """

    def __init__(self, config: DoctorConfig) -> None:
        self._json = config.json
        self._shown = False
        self.spots: Sequence[Spot] = (Spot(node=platform.node()),)
        self.findings: list[Finding] = []
        self.started_by, self.launched = "", False

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings; when finding them breaks, that is one."""
        try:
            for finding in findings:
                self.findings.append(finding)  # one by one: those before an error stay
        except Exception as error:
            self.findings.append(checks.failure("MPI", "judgement", f"{type(error).__name__}: {error}"))

    @property
    def status(self) -> int:
        """Exit status."""
        return status_of(self.findings)

    def text(self, findings: Sequence[Finding]) -> str:
        """Return the page with these findings, or the document."""
        nodes = list(dict.fromkeys(spot.node for spot in self.spots))
        if self._json:
            return document(findings, version=mpi_ef.__version__, ranks=len(self.spots), nodes=nodes)
        # Some launchers give every rank a terminal, whatever becomes of what it prints.
        color = not self.launched and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        many, some = len(self.spots), len(nodes)
        where = f"{many} rank{'s' if many > 1 else ''} on {nodes[0] if some == 1 else f'{some} nodes'}"
        title = f"mpi-ef doctor {mpi_ef.__version__}: {where}{self.started_by}"
        return page(title, findings, width=width_here(), color=color)

    def show(self) -> None:
        """Print everything, if that was not done yet."""
        if not self._shown:
            self._shown = True
            sys.stdout.write(self.text(self.findings) + "\n")  # in one piece: nothing of other ranks gets in between
            sys.stdout.flush()

    def hangs(self, what: str) -> None:
        """Say that the doctor itself hangs, and print what is known."""
        self.add(
            [
                Finding(
                    "MPI",
                    "hangs",
                    "error",
                    f"{what} does not come back",
                    "look at the launcher and at --mpi= (srun --mpi=list), at the network that MPI has chosen "
                    "(UCX_NET_DEVICES, FI_PROVIDER, OMPI_MCA_btl_tcp_if_include), and at the nodes; mpi-ef doctor "
                    "--patience S waits longer",
                )
            ]
        )
        self.show()


def width_here() -> int:
    """Return how many columns a page has here."""
    return min(120, max(80, shutil.get_terminal_size((100, 24)).columns))
