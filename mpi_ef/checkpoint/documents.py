"""Documents of a checkpoint: JSON that comes back as it was given."""

import json
from typing import Any

from mpi_ef.errors import CheckpointError

__all__ = ["checked_json"]


def checked_json(subject: str, document: Any) -> Any:
    """Return what reading `document` back will give; refuse what JSON would change without a word."""
    for value in _values(document):
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise CheckpointError(
                f"{subject}: a document has keys that are no text, {list(value)[:3]!r}; JSON needs text"
            )
        if not isinstance(value, dict | list | tuple | str | int | float | bool | type(None)):
            raise CheckpointError(f"{subject}: a document holds {type(value).__name__}, which is not JSON; convert it")
    return json.loads(json.dumps(document))


def _values(document: Any) -> Any:
    yield document
    if isinstance(document, dict | list | tuple):
        for value in document.values() if isinstance(document, dict) else document:
            yield from _values(value)
