"""Batch templates: ``mpi-ef slurm list``, show, copy and submit them. Needs no MPI, but for mpi-type.

A NAME is one of the list; "train" is short for train.sbatch. --profile takes a site of the list, or a file like those
that ``mpi-ef slurm show`` prints for a site. --set nodes=4 changes or adds #SBATCH --nodes=4, and --set exclusive adds
a line without value.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpi_ef import slurm
from mpi_ef.documents import MARK, read
from mpi_ef.errors import ConfigError, LaunchError, MpiEfError, OptionError
from mpi_ef.jobs.options import divided, refuse
from mpi_ef.slurm.mpi_types import choose, offered_by

__all__ = ["ask_srun", "main"]

PATIENCE_SECONDS = 60


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the tools. Exit status 0, 2 for what cannot be done, or that of sbatch."""
    before, after = divided(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(before)
    try:
        if after and arguments.tool is not _submit:
            raise OptionError("slurm: what stands after -- are arguments of the job; they go with submit")
        arguments.job_arguments = after
        sys.exit(arguments.tool(arguments))
    except MpiEfError as error:
        refuse(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpi-ef slurm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = parser.add_subparsers(required=True, metavar="TOOL")
    changes = argparse.ArgumentParser(add_help=False)
    changes.add_argument("--profile", metavar="SITE", help="what is known of a site, or a TOML file that tells it")
    changes.add_argument("--set", dest="options", action="append", default=[], metavar="KEY=VALUE",
                         help="an option of sbatch, such as nodes=4, time=02:00:00, account=project")

    changes.add_argument("name", metavar="NAME")

    def tool(function: Any, name: str, text: str, *parents: Any, usage: str | None = None) -> argparse.ArgumentParser:
        added = tools.add_parser(name, help=text, description=text, parents=parents, usage=usage)
        added.set_defaults(tool=function)
        return added

    tool(_list, "list", "list templates and sites")
    tool(_show, "show", "print a template, or what is known of a site", changes)
    copy = tool(_copy, "copy", "write a template into a folder, to be edited and submitted", changes)
    submit = tool(_submit, "submit", "submit a template to Slurm", changes,
                  usage="mpi-ef slurm submit NAME [--profile SITE] [--set KEY=VALUE ...] [--dry-run] [-- ARGUMENT ...]")
    copy.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=Path())
    submit.add_argument("--dry-run", action="store_true", help="print the script that would be submitted")
    kind = tool(_mpi_type, "mpi-type", "print the --mpi of srun that fits the MPI library of mpi4py, or nothing")
    kind.add_argument("--offered", metavar="TEXT",
                      help="what srun --mpi=list has printed, where srun is out of reach; - for standard input")
    return parser


def _list(_: argparse.Namespace) -> int:
    print("templates")
    print("\n".join(f"  {name:<20}{text}" for name, text in slurm.TEMPLATES.items()))
    print("\nsites (--profile)")
    for name in slurm.PROFILES:
        profile = slurm.read_profile(name)
        print(f"  {name:<20}{profile.description}{'' if profile.tested else '; from documentation, untried'}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    name, is_site = arguments.name, arguments.name in slurm.PROFILES
    if is_site and (arguments.profile or arguments.options):
        raise OptionError(f"slurm: --profile and --set are about templates, and {name} is a site; leave them out")
    print(slurm.profile_text(name) if is_site else _script(arguments), end="")
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    name, script = slurm.full_name(arguments.name), _script(arguments)
    path = arguments.folder / name
    try:
        if not arguments.folder.exists():  # what is there and no folder is found below
            arguments.folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(script)
    except FileExistsError:
        raise OptionError(f"slurm: {path} is there already; remove it, or name another folder") from None
    except OSError as error:
        raise OptionError(f"slurm: {path}: {error.strerror}; name a folder that can be written to") from None
    command = {"sbatch": "sbatch", "pbs": "qsub", "lsf": "bsub <"}[name.rpartition(".")[2]]
    print(f"{path}: edit the lines at the top, then submit it: {command} {path}")
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    name, script = slurm.full_name(arguments.name), _script(arguments)
    if not name.endswith(".sbatch"):
        raise OptionError(f"slurm: submit calls sbatch, which does not know {name}; copy it, and submit it by hand")
    command = ["sbatch", name, *arguments.job_arguments]
    if arguments.dry_run:
        print(script, end="")
        print("would be submitted with:", *command, file=sys.stderr)
        return 0
    program = shutil.which("sbatch")
    if program is None:
        raise LaunchError("slurm: there is no sbatch here; submit from a login node of the cluster, or pass --dry-run")
    with tempfile.TemporaryDirectory() as folder:  # sbatch takes a copy
        path = Path(folder) / name
        path.write_text(script, encoding="utf-8")
        sys.stdout.flush()
        return subprocess.run([program, str(path), *arguments.job_arguments], check=False).returncode  # noqa: S603


def _script(arguments: argparse.Namespace) -> str:
    """Return the template with the changes of ``--profile`` and ``--set``."""
    name = slurm.full_name(arguments.name)
    profile = _profile(arguments.profile) if arguments.profile else None
    options: dict[str, str | None] = {}
    for word in arguments.options:
        key, equals, value = word.partition("=")
        options[key.replace("_", "-")] = value if equals else None
    if not name.endswith(".sbatch"):
        if profile or options:
            raise OptionError(f"slurm: --profile and --set are about #SBATCH lines, which {name} has not; edit a copy")
        return slurm.read_template(name)
    if profile:
        _complain_about_missing(profile, options, strict=arguments.tool is _submit and not arguments.dry_run)
    return slurm.render(slurm.read_template(name), profile, options)


def _profile(name: str) -> slurm.Profile:
    if not name.endswith(".toml"):
        return slurm.read_profile(name)
    try:
        text = read(Path(name), MARK, follow=True).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"slurm: profile {name} cannot be read ({error}); name a site or a TOML file") from None
    return slurm.parse_profile(Path(name).stem, text)


def _complain_about_missing(profile: slurm.Profile, options: dict[str, str | None], *, strict: bool) -> None:
    """Raise, or print on stderr, which options that the site requires are not set."""
    missing = [key for key in profile.required if key not in options and f"SBATCH_{key.upper()}" not in os.environ]
    if not missing:
        return
    text = f"slurm: {profile.name} wants {', '.join(missing)}; add " + " ".join(f"--set {key}=..." for key in missing)
    if strict:
        raise OptionError(text)
    print(f"mpi-ef: {text}", file=sys.stderr)


def _mpi_type(arguments: argparse.Namespace) -> int:
    offered = sys.stdin.read() if arguments.offered == "-" else arguments.offered
    library = _library()
    kind, hint = choose(library, offered_by(ask_srun() if offered is None else offered))
    if kind and "Intel" in library and "I_MPI_PMI_LIBRARY" not in os.environ:
        hint = "mpi-type: Intel MPI also wants I_MPI_PMI_LIBRARY, the path of Slurm's libpmi2.so; ask the site where it is"
    if kind:
        print(kind)
    if hint:
        print(f"mpi-ef: {hint}", file=sys.stderr)
    return 0


def ask_srun(seconds: float | None = None) -> str:
    """Return what srun prints of what it offers, which is nothing where there is no srun, or it does not answer. Local."""
    try:
        ended = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, check=False,  # noqa: S607
                               timeout=seconds or PATIENCE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout + ended.stderr  # old versions print it as an error


def _library() -> str:
    """Return the version string of the MPI library, without starting it. mpi4py must not be imported before."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(f"mpi-type: mpi4py finds no MPI library ({error}); load the site's MPI first") from None
    return MPI.Get_library_version()
