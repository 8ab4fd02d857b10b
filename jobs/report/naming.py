"""What trained runs are called in a legend: by their method, and by the options in which they differ."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpi_ef.documents import shown
from mpi_ef.jobs.train.texts import in_texts

__all__ = ["method", "methods"]

_ASIDE = {"out", "text", "data", "overwrite", "log_every", "eval_every", "checkpoint_every", "keep", "save_in_background",
          "stop_after"}
# Options that the name of the method has.
_IN_NAME = {"optimizer", "precondition", "compressor", "ratio", "values", "block", "code"}
_MOST = 3  # options in a label
_LONGEST, _OF_CODE = 60, 30


def method(summary: Mapping[str, Any]) -> str:
    """Return optimizer, compressor and code of a run in a few words: "adamw, TopK(0.01, values=Quantize('bf16')), fr:1"."""
    config, built = summary["config"], summary.get("optimizer")
    text = built.get("compressor") if isinstance(built, Mapping) else None
    text = text if isinstance(text, str) else config["compressor"]
    text = "dense" if text in ("Identity()", "identity") else re.sub(r"\b(\w+)\(\w+=(?=[^()])", r"\1(", text)
    text = re.sub(r", block=\w+|, seed=0|, values=Identity\(\)", "", text)
    learned = config.get("precondition") or "none"
    first = f"{config.get('optimizer', '')}{'' if learned == 'none' else f' under {learned}'}"
    code = config.get("code") or "none"
    coded = "" if code == "none" else f", {in_texts(str(code))[:_OF_CODE]}"
    return shown(f"{first}, {text}".removeprefix(", "))[: _LONGEST - len(coded)] + shown(coded)


def methods(summaries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Return labels of runs: the method, options that differ between runs of it; names where that does not tell them."""
    plain = [method(summary) for summary in summaries]
    labels = [label + _differing(summary, [other for other, name in zip(summaries, plain, strict=True) if name == label])
              for summary, label in zip(summaries, plain, strict=True)]
    return [f"{label} ({name})" if labels.count(label) > 1 else label for label, name in zip(labels, names, strict=True)]


def _differing(summary: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Return the options of a run that are not the same in all of the others, as ", lr=0.01"."""
    options = [_options(other) for other in others]
    mine = _options(summary)
    names = [name for name in sorted({*(name for option in options for name in option)} - _ASIDE - _IN_NAME)
             if any(option.get(name) != mine.get(name) for option in options)]
    shown_ones = [f", {name.replace('_', '-')}={shown(str(mine[name]))[:20]}" for name in names[:_MOST] if name in mine]
    return "".join(shown_ones)


def _options(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {"ranks": summary.get("ranks"), "device": "auto"} | dict(summary["config"])  # earlier runs have no device
