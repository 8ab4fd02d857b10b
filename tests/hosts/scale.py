"""The tables of docs/scaling.md on throttled hosts of this machine, and what is to be reached: ``make scale``, as root.

    scale.py TEXT OUT [PART ...]

TEXT is a UTF-8 file to train on; "" takes the help texts that come with Python, which have other losses.
Parts: exchanges, advice, training, target, losses, rounds, resume; all by default. What a part has measured is in OUT, from
where the last table takes it. A part that was measured is not measured again: remove its file.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from hosts import SETTINGS, Hosts

HERE = Path(__file__).resolve().parent
RING = {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1", "OMPI_MCA_coll_tuned_allreduce_algorithm": "4",
        "OMPI_MCA_coll": "^han"}
D, RATIO = 2_000_000, 0.01
RING_NBYTES = 2 * 15 / 16 * 4 * D  # of dense vectors on 16 ranks
MODEL = ["context=32", "batch=1", "layers=8", "heads=5", "width=320"]  # 9.9 million parameters
SMALL = ["context=32", "batch=4", "layers=4", "heads=4", "width=128", "lr=0.004"]  # 0.8 million, as the examples'
TINY = ["--context", 32, "--batch", 2, "--layers", 2, "--heads", 2, "--width", 48, "--steps", 60, "--warmup", 10,
        "--values", "bf16"]
Found = dict[str, Any]


def python(name: str, *words: object) -> list[object]:
    return [sys.executable, HERE / name, *words]


def lines(text: str) -> list[Found]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def exchanges() -> Found:
    """Times of an exchange, and bytes of a host's link."""
    flat = ["MPI_Allreduce", "dense", "gather", "two-phase", "two-phase, reply k", "sign"]
    nodes = ["node gather", "node two-phase", "node two-phase, reply k", "node dense"]
    found = {}
    for hosts, ranks, mbit, names in (
            (4, 4, 100, flat), (4, 4, 1000, flat), (4, 8, 100, flat + nodes), (4, 8, 1000, flat + nodes),
            (4, 16, 100, flat + nodes), (16, 16, 100, ["gather", "two-phase", "two-phase, reply k"])):
        repeats = 5 if ranks < 16 else 3
        with Hosts(hosts, mbit) as on:
            text = on.run(ranks, *python("exchanges.py", D, RATIO, repeats, *names), within=900, environment=RING)
        found[f"{ranks} on {hosts}, {mbit}"] = lines(text)[-1]
    return found


def advice() -> Found:
    """What is advised, and what would have been best."""
    found = {}
    for hosts, ranks in ((4, 4), (4, 8)):
        for mbit in (100, 1000):
            with Hosts(hosts, mbit) as on:
                text = on.run(ranks, *python("advice.py", D, RATIO, 5), within=600)
            found[f"{ranks} on {hosts}, {mbit}"] = lines(text)[-1]
    return found


def training() -> Found:
    """Seconds and bytes of a step of a GPT of 9.9 million parameters."""
    found = {}
    for hosts, ranks in ((4, 4), (4, 8)):
        for mbit in (100, 1000):
            ways = ["topk", "sign", "identity", "MPI_Allreduce", "DDP fp32", "DDP fp16", *["topk by node"] * (ranks > hosts)]
            with Hosts(hosts, mbit) as on:
                text = on.run(ranks, *python("training.py", ",".join(ways), 6, 0, f"text={TEXT}", *MODEL), within=1500,
                              environment=RING)
            found[f"{ranks} on {hosts}, {mbit}"] = {line["way"]: line for line in lines(text)}
    return found


def target() -> Found:
    """Training seconds and validation losses of a GPT of 0.8 million parameters."""
    found = {}
    for hosts, ranks, mbit in ((4, 4, 100), (4, 8, 100), (4, 4, 1000), (4, 8, 1000)):
        with Hosts(hosts, mbit) as on:
            ways = "topk,MPI_Allreduce,identity,DDP fp32,DDP fp16"
            text = on.run(ranks, *python("training.py", ways, 80, 10, f"text={TEXT}", *SMALL), within=1500, environment=RING)
        found[f"{ranks} on {hosts}, {mbit}"] = {line["way"]: line for line in lines(text)}
    return found


def losses() -> Found:
    """Validation losses after equal steps."""
    done = subprocess.run([str(word) for word in python("losses.py", TEXT)], check=True, capture_output=True, text=True)
    rows: dict[str, list[Found]] = {}
    for row in lines(done.stdout):
        rows.setdefault(row["case"], []).append(row)
    return rows


def rounds() -> Found:
    """Bytes and losses of rounds of 15 steps against TopK 1 % in every step."""
    from losses import TOPK, loss

    every = {seed: loss(8, 240, 8, seed, TEXT, TOPK | {"plan": "GatherMean"}) for seed in (0, 1)}
    found: Found = {"every step": every}
    for values in ("bf16", "2bit"):
        more = {"compressor": "topk", "ratio": 0.03, "values": values, "exchange_every": 15, "plan": "GatherMean",
                "beta1": 0.9}
        found[values] = {seed: loss(8, 240, 8, seed, TEXT, more) for seed in (0, 1)}
    return found


def resume() -> Found:
    """32 ranks on 16 hosts, of which one dies; 24 on 12 go on."""
    out = OUT / "run"
    shutil.rmtree(out, ignore_errors=True)
    train = [Path(sys.executable).with_name("mpi-ef"), "train", "--text", TEXT, *TINY, "--log-every", 5, "--eval-every", 20,
             "--out", out]
    with Hosts(16, 100) as on:
        running = subprocess.Popen(on.mpirun(32, *train, "--checkpoint-every", 10), stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, env=os.environ | SETTINGS)
        while running.poll() is None and not (out / "checkpoints" / "step-00000030" / "COMMIT").exists():
            try:
                running.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        on.crash(["h7"])
        running.communicate(timeout=120)
        died = running.returncode
    with Hosts(12, 100) as on:
        asking = python("owed.py", out / "checkpoints", "--text", TEXT, *TINY, "--out", OUT / "none")
        owed = lines(on.run(24, *asking, within=300))
        whole = on.run(24, *train, "--checkpoint-every", 10, "--resume", "redistribute", within=600)
    summary = json.loads((out / "summary.json").read_text())
    return {"status of the killed run": died, "owed": owed[-1], "steps": summary["steps"], "loss": summary["val_loss"],
            "replicas equal": summary["replicas_equal"],
            "resumed": next(line for line in whole.splitlines() if "resumed" in line)}


PARTS: dict[str, Callable[[], Found]] = {
    part.__name__: part for part in (exchanges, advice, training, target, losses, rounds, resume)}


Row = tuple[str, str, Callable[[Found], float]]
CASES = ("4 on 4, 100", "4 on 4, 1000", "8 on 4, 100", "8 on 4, 1000")
MANY, EACH = "16 on 4, 100", "16 on 16, 100"


def over(case: str, one: str, other: str, what: str = "ms", of: str = "") -> Callable[[Found], float]:
    """Return what divides one way's figure by another's, in one case or in two."""
    return lambda found: found[case][one][what] / found[of or case][other][what]


def over_ring(case: str, way: str) -> Callable[[Found], float]:
    return lambda found: found[case][way]["link"] / RING_NBYTES


def mean(rows: list[Found]) -> float:
    return sum(row["loss"] for row in rows) / len(rows)


def losses_over(case: str, other: str) -> Callable[[Found], float]:
    return lambda found: mean(found[case]) / mean(found[other])


def links_over(case: str, other: str) -> Callable[[Found], float]:
    return lambda found: found[case][0]["link"] / found[other][0]["link"]


def rounds_over(values: str, place: int) -> Callable[[Found], float]:
    def total(of: Found) -> float:
        return sum(row[place] for row in of.values())

    return lambda found: total(found[values]) / total(found["every step"])


def sooner(case: str, other: str) -> Callable[[Found], float]:
    """Return how much longer another way takes to a validation loss of 2.70."""

    def seconds(way: Found) -> float:
        return next((spent for _, spent, loss in way["path"] if loss <= 2.7), math.inf)

    return lambda found: seconds(found[case][other]) / seconds(found[case]["topk"])


NARROW, EXACT = "node two-phase, reply k", "16 in 4 nodes, int8, reply 2k"
ROWS: dict[str, list[Row]] = {
    "exchanges": [
        ("bytes of a link, 16 ranks on 4 hosts: gather / nodes, two-phase, reply k", ">= 7",
         over(MANY, "gather", NARROW, "link")),
        ("nodes, two-phase, reply k / dense ring (formula)", "<= 0.00769", over_ring(MANY, NARROW)),
        ("nodes, dense / dense ring (formula)", "<= 0.9", over_ring(MANY, "node dense")),
        ("16 on 16: gather / two-phase, reply k", ">= 7.5", over(EACH, "gather", "two-phase, reply k", "link")),
        ("two-phase, reply k: 16 on 16 / 4 on 4", "<= 1.3",
         over(EACH, "two-phase, reply k", "two-phase, reply k", "link", of=CASES[0])),
        ("time, 8 on 4, 100 Mbit/s: MPI_Allreduce / nodes, dense", ">= 1.8", over(CASES[2], "MPI_Allreduce", "node dense")),
        ("the same: gather / nodes, gather", ">= 1.2", over(CASES[2], "gather", "node gather")),
        ("16 on 4: gather / nodes, gather", ">= 1.8", over(MANY, "gather", "node gather")),
        *((f"dense means, {case} Mbit/s: MPI_Allreduce, ring / DenseMean", ">= 1", over(case, "MPI_Allreduce", "dense"))
          for case in CASES[:2]),
    ],
    "losses": [
        ("validation loss, 8 in 2 nodes / gathered", "<= 1.01", losses_over("8 in 2 nodes", "8 gathered")),
        ("32 in 4 nodes / gathered", "<= 1.01", losses_over("32 in 4 nodes", "32 gathered")),
        ("16 in 4 nodes, two-phase, reply k / gathered", "<= 1.01", losses_over("16 in 4 nodes, reply k", "16 gathered")),
        ("16 in 4 nodes, two-phase, int8, reply 2k / gathered", "<= 1.01", losses_over(EXACT, "16 gathered")),
        ("the same: bytes of a link, 2e6 entries", "<= 0.143", links_over(EXACT, "16 gathered")),
        ("8 through owners / gathered", "<= 1.02", losses_over("8 through owners", "8 gathered")),
        ("32 through owners / gathered", "<= 1.02", losses_over("32 through owners", "32 gathered")),
    ],
    "rounds": [
        ("rounds of 15, 3 %, bf16: bytes / TopK 1 % in every step", "<= 0.2", rounds_over("bf16", 1)),
        ("the same: validation loss", "<= 1.06", rounds_over("bf16", 0)),
        ("rounds of 15, 3 %, two bits: bytes / TopK 1 % in every step", "<= 0.08", rounds_over("2bit", 1)),
        ("the same: validation loss", "<= 1.06", rounds_over("2bit", 0)),
    ],
    "training": [(f"step of 9.9 million parameters, {case} Mbit/s: {other} / topk",
                  ">= 6" if (case, other) == (CASES[0], "MPI_Allreduce") else "", over(case, other, "topk", "seconds"))
                 for case in CASES for other in ("MPI_Allreduce", "DDP fp32", "DDP fp16", "identity")],
    "target": [(f"time to validation loss 2.70, {case} Mbit/s: {other} / topk",
                ">= 5" if (case, other) == (CASES[0], "MPI_Allreduce") else "", sooner(case, other))
               for case in CASES for other in ("MPI_Allreduce", "DDP fp32", "DDP fp16")],
    "advice": [
        *((f"advice, {case} Mbit/s: what was advised / the fastest", "<= 1.3",
           lambda found, case=case: found[case]["regret"]) for case in CASES),
        ("bandwidth found at 100 Mbit/s, of what TCP leaves", "0.85 .. 1.15", lambda found: found[CASES[0]]["mbit"] / 95.6),
    ],
    "resume": [("32 ranks, one host killed, 24 go on: what is owed, difference", "<= 1e-6",
                lambda found: found["owed"]["lost"])],
}


def verdict(wanted: str, value: float) -> str:
    if not wanted:
        return ""
    if ".." in wanted:
        low, high = map(float, wanted.split(".."))
        return "reached" if low <= value <= high else "MISSED"
    sign, limit = wanted.split()
    return "reached" if (value >= float(limit) if sign == ">=" else value <= float(limit)) else "MISSED"


def main() -> None:
    for part in sys.argv[3:] or PARTS:
        path = OUT / f"{part}.json"
        if not path.exists():
            print(f"measuring: {part}", flush=True)
            path.write_text(json.dumps(PARTS[part](), indent=1) + "\n")
    for part, rows in ROWS.items():
        if (path := OUT / f"{part}.json").exists():
            found = json.loads(path.read_text())
            for what, wanted, figure in rows:
                value = figure(found)
                print(f"{what:76}{wanted:>14}{value:>10.3g}  {verdict(wanted, value)}")


if __name__ == "__main__":
    OUT = Path(sys.argv[2]).resolve()
    OUT.mkdir(parents=True, exist_ok=True)
    TEXT = Path(sys.argv[1]).resolve() if sys.argv[1] else OUT / "text.txt"
    if not sys.argv[1]:
        TEXT.write_text("\n".join(topics.values()), encoding="utf-8")
    main()
