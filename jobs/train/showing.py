"""What ``mpi-ef train`` prints: lines of progress, and a table at the end."""

from itertools import chain, repeat
from typing import Any

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.errors import counted
from mpi_ef.jobs.metrics import Metrics, Progress, in_bytes, suspects

__all__ = ["line", "record", "table"]


def record(row: dict[str, Any], metrics: Metrics | None, progress: Progress, *, step_seconds: float | None) -> None:
    """Let rank 0 write a row, and show it after a validation, or when the last one is a while ago."""
    if metrics is not None:
        metrics.write(row)
        if row["val_loss"] is not None or progress.due():
            progress.show(row["step"], line(row), step_seconds=step_seconds)


def line(row: dict[str, Any]) -> str:
    """Return a row in a few words. Local."""
    held_out = "" if row["val_loss"] is None else f"  val {row['val_loss']:.3f}"
    if row["val_accuracy"] is not None:
        held_out += f" ({100 * row['val_accuracy']:.1f} %)"
    dense, sent = row["dense_nbytes"], row["sent_nbytes"]  # nothing yet in the first round of local steps
    less = f" ({_ratio(sent, dense, ' than dense')})" if dense and sent else ""
    return f"loss {row['loss']:.3f}{held_out}  sent {in_bytes(sent)}{less}"


def _of_preconditioner(summary: dict[str, Any]) -> str:
    sent, given_up = in_bytes(summary["statistics_nbytes"]), summary["fallen_back_at"]
    ended = "" if given_up is None else f"; given up in step {given_up}"
    return f"{summary['config']['precondition']}, {counted(summary['updates'], 'exchange')} of {sent} in all{ended}"


def _ratio(sent: float, dense: float, than: str = "") -> str:
    if dense < 1.5 * sent and sent < 1.5 * dense:  # "1x less" says nothing
        return f"{100 * sent / dense:.0f} % of dense"
    return f"{dense / sent:.0f}x less{than}" if sent < dense else f"{sent / dense:.1f}x more{than}"


def _answers(summary: dict[str, Any]) -> str:
    missing = f"; missing at the end: {ranks_text(summary['missing'])}" if summary["missing"] else ""
    return f"{summary['late']} late, {summary['wrong']} wrong, {summary['not_finite']} not finite{missing}"


def _replicas(summary: dict[str, Any]) -> str:
    own = "of each rank its own, their median " if summary.get("own_parameters") else ""
    return own + ("equal bit for bit" if summary["replicas_equal"] else "DIFFERENT")


def table(summary: dict[str, Any]) -> str:
    """Return what is said at the end, of a summary. Local."""
    sent, dense = summary["sent_nbytes"], summary["dense_nbytes"]
    share = _ratio(sent, dense) if sent and dense else "one rank sends nothing"
    share += f", {100 * sent / dense:.2f} %" if " of dense" not in share and sent and dense else ""
    steps, seconds = summary["untimed_steps"], summary["untimed_seconds"]
    untimed = f"{seconds:.1f} s, {counted(steps, 'step')} in which kernels were compiled or loaded"
    rows = [("validation loss", f"{summary['val_loss']:.4f}"), ("training loss", f"{summary['loss']:.4f}")]
    if summary["val_accuracy"] is not None:
        rows.append(("validation accuracy", f"{100 * summary['val_accuracy']:.2f} %"))
    nodes = summary.get("nodes", 1)
    rows += [
        ("bytes sent per rank", f"{in_bytes(sent)} (dense: {in_bytes(dense)}; {share})"),
        *[("bytes per node", f"{in_bytes(summary['link_nbytes'])} each way over the link of one of {nodes}")
          for _ in range(nodes > 1)],
        ("time", f"{summary['seconds']:.1f} s, {1e3 * summary['seconds_per_step']:.1f} ms per step"),
        *((f"  {name}", f"{1e3 * value:.2f} ms per step") for name, value in summary["phases_seconds_per_step"].items()),
        *[("  not counted", untimed)] * bool(steps),
        ("steps skipped", str(summary["skipped_steps"])),
        *[("exchanges", f"{summary['rounds']} in {summary['steps']} steps, {summary['skipped_rounds']} skipped")
          for _ in range("rounds" in summary)],
        *[("preconditioner", _of_preconditioner(summary)) for _ in range("updates" in summary)],
        *[("left out", suspects(summary["suspicion"])) for _ in range("suspicion" in summary)],
        *zip(chain(["who is slow"], repeat("")), summary.get("lateness", {}).get("lines", []), strict=False),
        *(("computed on", f"{text} ({ranks})") for text, ranks in summary["devices"].items()),
        *[("replicas", _replicas(summary)) for _ in range("replicas_equal" in summary)],
        *[("answers", _answers(summary)) for _ in range("missing" in summary)],
        ("written to", summary["config"]["out"]),
    ]
    return "\n".join(["", *(f"{name:<22}{value}" for name, value in rows)])
