"""Batch templates and what is known of some sites, as package data; process managers of srun and of MPI libraries."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from mpi_ef.errors import ConfigError, OptionError, briefly, nearest

__all__ = ["PROFILES", "TEMPLATES", "Profile", "full_name", "parse_profile", "profile_text", "read_profile", "read_template",
           "render"]

TEMPLATES = {
    "train.sbatch": "train on one node",
    "train-nodes.sbatch": "train on several nodes",
    "train-gpu.sbatch": "train on several nodes with GPUs, also with a program of yours",
    "sweep.sbatch": "an array: one training per line of a list of options",
    "chain.sbatch": "a long training as a chain of jobs, one after the other",
    "preemptible.sbatch": "train on nodes that others may take away",
    "container.sbatch": "train in an apptainer container",
    "bench.sbatch": "mpi-ef bench on 1, 2, 4, ... nodes",
    "tests.sbatch": "the package's tests on 1, 2, 3, ... ranks",
    "train.pbs": "train under PBS Pro or OpenPBS",
    "train.lsf": "train under LSF",
}
PROFILES = ("generic", "lumi-c", "lumi-g", "frontier", "perlmutter", "juwels", "tacc")

_ALL = "mpi-ef slurm list shows all"
_SITE = re.compile(r"^# ==== your site:.*\n", flags=re.MULTILINE)  # lines of a profile go below
_OPTION = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Profile:
    """What is known of a site.

    Attributes
    ----------
    name, description : str
    tested : bool
        False where everything is from public documentation, and untried there.
    sources : tuple of str
        Where it is from.
    required : tuple of str
        Options of sbatch that the site requires and that have no default.
    sbatch : mapping of str to str or None
        Options of sbatch; None for one without value.
    environment : mapping of str to str
        Variables of the templates.
    lines : tuple of str
        Shell lines, for example ``module load ...``.
    """

    name: str
    description: str
    tested: bool = True
    sources: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    sbatch: Mapping[str, str | None] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


def full_name(name: str) -> str:
    """Return the file name of a template; "train" stands for "train.sbatch". Raises `OptionError` where there is none."""
    for known in (name, f"{name}.sbatch"):
        if known in TEMPLATES:
            return known
    short = [known.removesuffix(".sbatch") for known in TEMPLATES]
    raise OptionError(f"slurm: there is no template {briefly(name)}; {nearest(name, short, _ALL)}")


def read_template(name: str) -> str:
    """Return the text of a template, as :func:`full_name` finds it."""
    return (resources.files(__name__) / full_name(name)).read_text(encoding="utf-8")


def profile_text(name: str) -> str:
    """Return the TOML document of a site. Raises `OptionError` where there is none."""
    if name not in PROFILES:
        raise OptionError(f"slurm: there is no profile {briefly(name)}; {nearest(name, PROFILES, _ALL)}")
    return (resources.files(__name__) / "profiles" / f"{name}.toml").read_text(encoding="utf-8")


def read_profile(name: str) -> Profile:
    """Return what is known of a site, from :func:`profile_text`."""
    return parse_profile(name, profile_text(name))


def parse_profile(name: str, text: str) -> Profile:
    """Return the profile that a TOML document describes. Local.

    Raises
    ------
    ConfigError
        It has keys that are unknown, or of the wrong type.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        text = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise ConfigError(f'slurm: profile {name} is no TOML ({text}); write lines like partition = "standard"') from None
    kinds = {"description": str, "tested": bool, "sources": list, "required": list, "sbatch": dict,
             "environment": dict, "lines": list}
    for key, value in document.items():
        if not isinstance(value, kinds.get(key, ())):
            raise ConfigError(f"slurm: profile {name}: {key} = {briefly(value)} is not known; take {', '.join(kinds)}")
    texts = {key: tuple(map(str, document.get(key, ()))) for key in ("sources", "required", "lines")}
    sbatch = {option: None if value is True else str(value) for option, value in document.get("sbatch", {}).items()}
    environment = {variable: str(value) for variable, value in document.get("environment", {}).items()}
    return Profile(name, document.get("description", name), document.get("tested", True), sbatch=sbatch,
                   environment=environment, **texts)


def render(text: str, profile: Profile | None = None, options: Mapping[str, str | None] | None = None) -> str:
    """Return a Slurm template for a site, with other options of sbatch. Local.

    Parameters
    ----------
    text : str
        A template.
    profile : Profile, optional
        Its options replace those of the template, its shell lines and variables are written at "your site". A variable
        that is set when the job is submitted wins.
    options : mapping of str to str or None, optional
        ``{"nodes": "4", "exclusive": None}`` makes the lines ``#SBATCH --nodes=4`` and ``#SBATCH --exclusive``. They
        replace those of the profile.

    Raises
    ------
    OptionError
        Something that is no long option of sbatch, or a value that fits on no line.
    """
    settings: dict[str, str | None] = dict(profile.sbatch) if profile else {}
    settings |= options or {}
    for option, value in settings.items():
        text = _with_option(text, option.replace("_", "-"), value)
    if profile is None:
        return text
    lines = [f"# From the profile {profile.name}: {profile.description}."]
    if not profile.tested:
        lines.append("# Taken from public documentation, and never tried there.")
    lines += profile.lines
    lines += [f"export {name}=${{{name}-{_quoted(value)}}}" for name, value in profile.environment.items()]
    block = "".join(f"{line}\n" for line in lines)
    return _SITE.sub(lambda found: found[0] + block, text, count=1)


def _with_option(text: str, option: str, value: str | None) -> str:
    """Return the script with this option: on the line that has it, active or not, else below the last."""
    if not _OPTION.fullmatch(option) or len(option) < 2:
        raise OptionError(f"slurm: {briefly(option)} is no long option of sbatch; set for example nodes=4 or "
                          "account=project")
    if value is not None and not re.fullmatch(r"[^\n\r\"\\]+", value):
        raise OptionError(f"slurm: {option}={briefly(value)} fits on no #SBATCH line; leave out quotes, backslashes, "
                          "line ends")
    line = f"#SBATCH --{option}" if value is None else f"#SBATCH --{option}={_quoted(value)}"
    for comment in ("", "#"):
        present = re.compile(rf"^{comment}#SBATCH --{option}(=.*)?$", flags=re.MULTILINE)
        if present.search(text):
            return present.sub(lambda _: line, text, count=1)
    *_, last = re.finditer(r"^#SBATCH .*$", text, flags=re.MULTILINE)
    return f"{text[: last.end()]}\n{line}{text[last.end() :]}"


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"[\s#]", value) else value
