"""What there is by name: compressors, aggregators, rules, plans, optimizers; built in, of other packages, or of a module.

A *specification* is a text that says which and how, as one would write it in Python, and as objects print themselves::

    TopK(0.01, values=Quantize('bf16'))      econtrol(eta=0.1)      OneBitAdam(freeze_step=130)      my_module:MyThing(3)

Names are looked up among what is built in, then in the entry points of installed packages (groups ``mpi_ef.compressors``,
``mpi_ef.aggregators``, ``mpi_ef.rules``, ``mpi_ef.plans``, ``mpi_ef.optimizers``, ``mpi_ef.models``); ``module:name``
imports. Arguments are numbers, texts, True, False, None, lists and tuples of these, and specifications of compressors and
aggregators, ``TopK(0.1, values=my_module:MyCompressor(3))``, where a dot may stand for the colon: nothing is evaluated.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, Signature, isabstract, isclass, signature
from threading import Lock
from typing import Any

from mpi_ef.errors import OptionError, briefly, nearest

__all__ = ["Specification", "built", "fitting", "found", "names", "options_of", "same", "specified"]

_parsing = Lock()  # threads that parse at the same time make CPython 3.11 raise SystemError
# Where what is built in is listed, and what it is: a class of the module's __all__, or a line in the table of rules.
_HOMES: Mapping[str, tuple[str, str]] = {
    "compressor": ("mpi_ef.compress", "Compressor"),
    "plan": ("mpi_ef.collectives", "Plan"),
    "rule": ("mpi_ef.feedback", ""),
    "aggregator": ("mpi_ef.robust", "Aggregator"),
    "optimizer": ("mpi_ef.optim", "FlatOptimizer"),
    "model": ("", ""),  # those of mpi-ef train are no functions of a configuration
}
_GIVEN = {"compressor": 0, "aggregator": 0, "plan": 4, "optimizer": 2, "model": 1}  # arguments before those of a text
_FORM = re.compile(r"\s*([A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?(?:-\w+)*)\s*(\(.*\))?\s*", re.DOTALL)
_QUOTED_OR_PATH = re.compile(r'''("{3}|'{3}|"|')(?:\\.|(?!\1).)*\1|(\b[A-Za-z_][\w.]*)\s*:\s*(?=[A-Za-z_])''', re.DOTALL)


@dataclass(frozen=True)
class Specification:
    """What a text specifies.

    Attributes
    ----------
    name : str
    thing : object
        What has that name.
    arguments : tuple
    options : dict of str to object
    """

    name: str
    thing: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def _built_in(kind: str) -> Mapping[str, Any]:
    module, base = _HOMES[kind]
    if not module:
        return {}
    home = import_module(module)
    if not base:
        rules: Mapping[str, Any] = home.RULES
        return rules
    classes = {name: getattr(home, name) for name in home.__all__ if isclass(getattr(home, name))}
    parents = {name: [parent.__name__ for parent in c.__mro__[1:]] for name, c in classes.items()}
    return {name: c for name, c in classes.items() if base in parents[name] and not isabstract(c)}


def names(kind: str) -> list[str]:
    """Return what there is of a kind, built in or installed. Local.

    Parameters
    ----------
    kind : {"compressor", "aggregator", "rule", "plan", "optimizer", "model"}
    """
    return sorted({*_built_in(kind), *(point.name for point in entry_points(group=f"mpi_ef.{kind}s"))})


def found(kind: str, name: str) -> Any:
    """Return what has a name, or what ``module:name`` stands for. Local.

    Raises
    ------
    OptionError
        There is nothing of that name (the line names the nearest), or it cannot be imported.
    """
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            return getattr(import_module(module), attribute)
        if name in (known := _built_in(kind)):
            return known[name]
        for point in entry_points(group=f"mpi_ef.{kind}s", name=name):
            return point.load()
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{kind} {briefly(name)} cannot be loaded: {error}") from error
    listed = ", ".join(names(kind))
    hint = nearest(name, names(kind), f"take one of {listed}, or module:name" if listed else "write module:name")
    raise OptionError(f"there is no {kind} {briefly(name)}; {hint}")


def specified(kind: str, text: str) -> Specification:
    """Return what a text specifies, without building it. Local.

    Raises
    ------
    OptionError
        The text is no specification, or names something that there is not.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise OptionError(
            f"{briefly(text)} is no {kind}: write a name, with arguments where it takes some, such as {_example(kind)}"
        )
    name, call = match.groups()
    try:
        with _parsing:
            tree = ast.parse(f"f{_dotted(call or '()')}", mode="eval").body
    except SyntaxError as error:
        raise OptionError(f"{briefly(text)} is no {kind}: {error.msg}; write for example {_example(kind)}") from None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise OptionError(f"{briefly(text)} is no {kind}; write for example {_example(kind)}")
    arguments, options = _arguments(tree, text)
    return Specification(name, found(kind, name), arguments, options)


def built(kind: str, text: str, *given: Any, **settings: Any) -> Any:
    """Return the compressor or aggregator that a text specifies; of another kind, what calling it so returns. Local.

    Parameters
    ----------
    kind, text : str
    *given
        Arguments before those of the text.
    **settings
        Options besides those of the text, which must not be among them.

    Raises
    ------
    OptionError
        As :func:`specified`; or the arguments do not fit, with the nearest name of an option.
    """
    what = fitting(specified(kind, text), text, *given, **settings)
    return what.thing(*given, *what.arguments, **what.options, **settings)


def fitting(what: Specification, text: str, *given: Any, **settings: Any) -> Specification:
    """Return a specification; raise `OptionError` unless :func:`built` could call it so. Local."""
    if not callable(what.thing):
        raise OptionError(f"{briefly(text)}: {what.name} is a {type(what.thing).__name__}, which cannot be built")
    form = _form(what.thing)
    taken = form.parameters
    theirs = [name for name in [*taken][len(given) :] if name not in settings]  # what is the caller's is no option
    free = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values())
    for option in what.options:
        if option not in theirs and not (free and option not in taken):
            hint = nearest(option, theirs, f"it has: {', '.join(theirs) or 'none'}")
            raise OptionError(f"{briefly(text)}: {what.name} has no option {option}; {hint}")
    try:
        form.bind(*given, *what.arguments, **what.options, **settings)
    except TypeError as error:
        raise OptionError(f"{briefly(text)}: {what.name}: {error}") from None
    return what


def same(kind: str, first: str, second: str) -> bool:
    """Return whether two texts specify the same, in whatever order options stand, and with defaults or without. Local."""
    if first == second:
        return True
    try:
        one, two = (specified(kind, text) for text in (first, second))
        return one.thing is two.thing and _alike(_bound(kind, one), _bound(kind, two))
    except (OptionError, TypeError, ValueError, RecursionError):  # the last three: what authors made of comparing
        return False


def _alike(one: Any, two: Any) -> bool:
    """Return whether two values are the same, all that is in them included.

    ``==`` does not tell: a class that inherits it from a dataclass compares only what that one has, and 1 == True.
    """
    if type(one) is not type(two):
        return {type(one), type(two)} == {int, float} and bool(one == two)
    own = vars(type(one))
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_alike, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_alike(value, two[name]) for name, value in one.items())
    if "__dataclass_fields__" in own:
        return all(_alike(getattr(one, field.name), getattr(two, field.name)) for field in fields(one) if field.compare)
    comparable = "__eq__" in own or not hasattr(one, "__dict__") or isclass(one)
    return bool(one == two) if comparable else one is two or _alike(vars(one), vars(two))


def _bound(kind: str, what: Specification) -> dict[str, Any]:
    if not callable(what.thing):  # a rule: its options have names, and defaults that follow from others
        return {"": what.arguments, **what.options}
    bound = _form(what.thing).bind_partial(*[None] * _GIVEN[kind], *what.arguments, **what.options)
    bound.apply_defaults()
    return dict(bound.arguments)


def options_of(what: Specification) -> list[str]:
    """Return the names of the parameters of what a text specifies, in their order. Local."""
    return [*_form(what.thing).parameters] if callable(what.thing) else []


def _form(thing: Any) -> Signature:
    if not isclass(thing):
        return signature(thing)
    form = signature(thing.__init__)  # not that of a metaclass
    return form.replace(parameters=[*form.parameters.values()][1:])


def _dotted(call: str) -> str:
    """Return arguments with a dot, which Python can parse, in place of the colon of every ``module:name``."""
    return _QUOTED_OR_PATH.sub(lambda found: f"{found[2]}." if found[2] else found[0], call)


def _arguments(call: ast.Call, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(
        not keyword.arg for keyword in call.keywords
    ):
        raise OptionError(f"{briefly(text)}: * and ** mean nothing here; write the arguments")
    options = {keyword.arg or "": _value(keyword.value, text) for keyword in call.keywords}
    return tuple(_value(argument, text) for argument in call.args), options


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -_value(node.operand, text)
    if isinstance(node, ast.Tuple | ast.List):
        values = [_value(element, text) for element in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values
    if isinstance(node, ast.Call) and re.fullmatch(r"[\w.]+", ast.unparse(node.func)):
        name = ":".join(ast.unparse(node.func).rsplit(".", 1))
        inner = fitting(Specification(name, _found_inside(name), *_arguments(node, text)), text)
        return inner.thing(*inner.arguments, **inner.options)
    raise OptionError(f"{briefly(text)}: {ast.unparse(node)[:60]} is no value: take numbers, texts, True, False, None, "
                      "lists and tuples of these, or compressors, such as Sign()")


def _found_inside(name: str) -> Any:
    """Return the compressor or the aggregator of a name, as :func:`found`."""
    of_kind = {kind: names(kind) for kind in ("compressor", "aggregator")}
    near = nearest(name, [known for listed in of_kind.values() for known in listed])
    aggregates = any(name == known or f"mean {known}?" in near for known in of_kind["aggregator"])
    return found("aggregator" if aggregates else "compressor", name)


def _example(kind: str) -> str:
    return {"compressor": "TopK(0.01, values=Quantize('bf16'))", "aggregator": "NNM(TrimmedMean())",
            "rule": "econtrol(eta=0.1)", "plan": "GatherMean", "optimizer": "OneBitAdam(freeze_step=130)",
            "model": "my_model:build(width=32)"}[kind]
