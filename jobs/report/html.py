"""One HTML page with tables and pictures inside: it can be mailed, and opened without a network."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from platform import node
from tempfile import TemporaryDirectory

from mpi_ef.documents import shown, shown_lines
from mpi_ef.errors import DataError
from mpi_ef.jobs.folder import write_whole

__all__ = ["Section", "write"]

_STYLE = """
body { font-family: system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; margin-top: 2.5rem }
pre { background: #f6f6f4; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; line-height: 1.45 }
img { max-width: 100%; height: auto }
nav a { margin-right: 1.2em }
.made { color: #555; font-size: .85rem }
"""


@dataclass(frozen=True)
class Section:
    """A part of a report: runs of one kind."""

    kind: str  # of the program that wrote the runs; names the pictures where there are several
    title: str
    text: str
    draw: Callable[[Path], None]  # into a file
    made: str = ""  # when and where, by how many ranks: on the page only

    def __post_init__(self) -> None:
        """Escape what no terminal and no page is to obey."""
        object.__setattr__(self, "title", shown(self.title))
        object.__setattr__(self, "text", shown_lines(self.text))
        object.__setattr__(self, "made", shown_lines(self.made))


def write(sections: Sequence[Section], path: Path) -> None:
    """Write all sections into one file. Raises `DataError` without matplotlib, or where the file cannot be written."""
    links = "".join(f'<a href="#{n}">{escape(section.title)}</a>' for n, section in enumerate(sections))
    body = "\n".join(_section(n, section) for n, section in enumerate(sections))
    written = f"written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {shown(node()) or 'a host without a name'}"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>mpi-ef report</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>mpi-ef report</h1>\n<p>{escape(written)}</p>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )
    try:
        write_whole(path, page)
    except DataError as error:
        raise DataError(f"{path}: the page cannot be written ({error}); name another file") from None


def _section(number: int, section: Section) -> str:
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        section.draw(picture)
        data = b64encode(picture.read_bytes()).decode()
    made = "<br>\n".join(map(escape, section.made.splitlines()))
    return (
        f'<h2 id="{number}">{escape(section.title)}</h2>\n<p class="made">{made}</p>\n<pre>{escape(section.text)}</pre>\n'
        f'<img alt="{escape(section.title)}" src="data:image/png;base64,{data}">'
    )
