"""Methods on a command line: rules, compressors and plans as specifications."""

from mpi_ef.errors import ConfigError, OptionError, briefly

__all__ = ["check_part", "methods_in"]


def check_part(kind: str, text: str) -> None:
    """Raise `OptionError` unless a text specifies a rule, a compressor, an aggregator or a plan, with its options. Local."""
    from mpi_ef import registry
    from mpi_ef.collectives.chosen import plan_named
    from mpi_ef.feedback.table import rule_of, with_momentum

    if kind in ("compressor", "aggregator"):
        registry.built(kind, text)
    elif kind == "plan":
        plan_named(text)
    else:
        registry.specified(kind, text)
        rule, options = rule_of(text)
        (with_momentum(rule) if "momentum" in options else rule).options_for(1.0, options)


def methods_in(text: str | None, *, plans: bool = True) -> list[list[str]]:
    """Return the rule, the compressor and maybe the plan of every method in a text, which semicolons separate.

    Raises
    ------
    ConfigError
        There is none of that name, or an option does not fit.
    """
    if text is None:
        return []
    found = []
    for method in text.split(";"):
        words = _words(method)
        if len(words) != 2 and not (plans and len(words) == 3):
            forms = "RULE COMPRESSOR or RULE COMPRESSOR PLAN" if plans else "RULE COMPRESSOR"
            raise ConfigError(f"methods: {briefly(method.strip())} is not {forms}, such as 'econtrol(eta=0.1) TopK(0.05)'")
        try:
            for kind, word in zip(("rule", "compressor", "plan"), words, strict=False):
                check_part(kind, word)
        except OptionError as error:
            raise ConfigError(f"methods: {error}") from None
        found.append(words)
    return found


def _words(text: str) -> list[str]:
    """Cut a text at spaces that are in no parentheses."""
    words, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character.isspace() and depth == 0:
            words.append("")
        else:
            words[-1] += character
    return [*filter(None, words)]
