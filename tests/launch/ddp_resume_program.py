"""Trainings under DistributedDataParallel that go on with other numbers of ranks: ``python ddp_resume_program.py FOLDER``.

Started by test_ddp_resume.py. A world of n ranks is a group of the first n of four processes; all processes check what the
ranks of a world have seen. Each program prints a line when it has passed everywhere.
"""

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ddp_program import (
    PER_PARAMETER,
    SMALL_BUCKETS,
    Known,
    WatchedHook,
    assert_rebuilt,
    bits,
    everywhere,
    known_gradients,
    network,
    train,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from mpi_ef import LowRank, Sign, Store, TopK, Training
from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.errors import OptionError

RANKS = 4
GROUPS = {}
CASES = {
    "ef14": {"rule": "ef14", "compressor": TopK(0.1)},
    "ef14 sign": {"rule": "ef14", "compressor": Sign(block=64)},  # on two phases
    "ef14 low rank": {"rule": "ef14", "compressor": LowRank(2, shapes="parameters")},
    "ef21": {"rule": "ef21", "compressor": TopK(0.2), "dense_steps": 1},
    "ef21-sgdm": {"rule": "ef21-sgdm", "compressor": PER_PARAMETER, "dense_steps": 1},
    "econtrol two-phase": {"rule": "econtrol", "compressor": TopK(0.3), "plan": partial(TwoPhaseMean, reply=TopK(0.2)),
                           "eta": 0.1},
}
RESIDUAL = "plan.residual"


def hooked(size, case, module):
    model = DDP(module, process_group=GROUPS[size], bucket_cap_mb=SMALL_BUCKETS)
    return model, WatchedHook(model, **case)


def goes_on(size, case, folder, steps, *, policy="redistribute", before=()):
    """Resume, train and save on `size` ranks; return what each of them has seen. `before`: states that were saved."""
    seen = None
    if dist.get_rank() < size:
        model, hook = hooked(size, case, network())
        store, training = Store(folder), Training(model=model.module, hook=hook)
        start = training.resume(store, hook.comm, policy=policy)
        loaded, made = hook.state_dict(), None
        if before:
            made = hook.state_dict_from(before, dist.get_rank(), size)
        losses = train(model, range(start, start + steps), lr=0.2)
        training.save(store, hook.comm, start + steps)
        store.close()
        seen = {"start": start, "loaded": loaded, "made": made, "losses": losses, "saved": hook.state_dict(),
                "parameters": bits(model.parameters()), "notes": training.notes}
    rows = everywhere(seen)[:size]
    assert len({row["parameters"] for row in rows}) == 1
    return rows


def of(rows, key):
    return [row[key] for row in rows]


def stacks(states):
    """Yield for each parameter its arrays of all ranks, (ranks, ...), by name."""
    for name in states[0]["parameters"]:
        of_ranks = [state["parameters"][name]["arrays"] for state in states]
        yield name, {key: np.stack([arrays[key].numpy() for arrays in of_ranks]) for key in of_ranks[0]}


def same_bits(one, other):
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def mean_of(rows):
    total = np.zeros(rows[0].shape)
    for row in rows:
        total += row
    return (total / len(rows)).astype(rows.dtype)


def assert_moved(old, new, *, trained):
    """What the rules rely on, to the last bit. `trained`: the old ranks differ, and all kinds of arrays have numbers."""
    seen = set()
    for (name, before), (_, after) in zip(stacks(old), stacks(new), strict=True):
        assert before.keys() == after.keys()
        owed = before[RESIDUAL].sum(axis=0) if RESIDUAL in before else None
        for key, rows in after.items():
            if key == RESIDUAL:
                assert same_bits(rows.sum(axis=0) + 0, owed + 0), name  # -0 or 0
                assert ((rows != 0).sum(axis=0) <= 1).all()
                seen |= {key} if owed.any() else set()
                continue
            if key in {"g", "h"}:
                expected = before[key][0]
            elif key in {"g_i", "h_i"}:
                expected = before[key[0]][0] if owed is None else before[key[0]][0] + owed
            else:
                expected = mean_of(before[key])
            assert all(same_bits(row, expected) for row in rows), (name, key)
            seen |= {key} if len(old) == 1 or key in {"g", "h"} or (before[key] != before[key][0]).any() else set()
    assert seen == after.keys() or not trained
    for state in new:
        assert (state["steps"], state["skipped_steps"], state["sent_nbytes"]) == (old[0]["steps"], 0, 0)
        assert [plan["bucket"] for plan in state["plans"]] == [plan["bucket"] for plan in old[0]["plans"]]
        for plan, theirs in zip(state["plans"], old[0]["plans"], strict=True):
            assert bits(plan["arrays"].values()) == bits(theirs["arrays"].values())
        for name, of_parameter in state["parameters"].items():
            counters = {key: of_parameter[key] for key in ("steps", "exchanges")}
            assert counters.items() <= old[0]["parameters"][name].items()


def assert_estimates_are_in_balance(states):
    """What went into the buckets and has been trained with: g is the mean of the g_i, less what two phases owe."""
    for name, arrays in stacks(states):
        for key in {"g_i", "h_i"} & arrays.keys():
            whole = arrays[key[0]][0] + (arrays[RESIDUAL].sum(axis=0) if RESIDUAL in arrays else 0)
            np.testing.assert_allclose(whole, mean_of(arrays[key]), rtol=1e-4, atol=1e-6, err_msg=name)


def redistributed(folder):
    for case, hook in CASES.items():
        old, path, trained = [], [], 0
        for size, steps in ((3, 10), (2, 6), (4, 0), (1, 2), (3, 8)):
            rows = goes_on(size, hook, folder / case, steps, before=old)
            assert rows[0]["start"] == len(path)
            if old:
                assert_moved(old, of(rows, "loaded"), trained=trained > 0)
                assert all(packed(row["made"]) == packed(row["loaded"]) for row in rows)  # the same without Training
                assert "errors and momenta are the mean over the old ranks" in rows[0]["notes"][0]
                assert not any("hook" in note for note in rows[0]["notes"])
            old, trained = of(rows, "saved"), steps
            assert_estimates_are_in_balance(old)
            path += np.mean(of(rows, "losses"), axis=0).tolist()
        assert_falls(path, case)


def packed(state):
    """Return a state as what can be compared."""
    return {key: packed(value) if isinstance(value, dict) else bits([value]) if isinstance(value, torch.Tensor) else
            [packed(part) for part in value] if key == "plans" else value for key, value in state.items()}


def assert_falls(path, case):
    assert np.mean(path[-6:]) < 0.8 * np.mean(path[:3]), (case, path)


def nothing_is_lost(folder):
    """What was told plus what is still owed is what was meant, over a sequence of worlds, to the last digits."""
    ways = {"topk": {"compressor": TopK(0.1)}, "sign": {"compressor": Sign(block=64)},
            "topk two-phase": {"compressor": TopK(0.1), "plan": partial(TwoPhaseMean, reply=TopK(0.05))}}
    for name, case in ways.items():
        meant, told, start = 0.0, 0.0, 0
        for size in (3, 2, 4, 1, 3):
            seen, steps = None, range(start, start + 3)
            if dist.get_rank() < size:
                model, hook = hooked(size, case | {"rule": "ef14"}, Known(torch.float64))
                store, training = Store(folder / f"lost {name}"), Training(hook=hook)
                assert training.resume(store, hook.comm, policy="redistribute") == start
                own, out = 0.0, 0.0
                for step in steps:
                    gradients = known_gradients(dist.get_rank(), step, np.float64)
                    model.zero_grad()
                    model(gradients).backward()
                    own = own + flat(gradients[name] for name in Known.SHAPES)
                    out = out + flat(p.grad for p in model.parameters())
                training.save(store, hook.comm, steps.stop)
                store.close()
                assert_rebuilt(hook)
                seen = own, out, hook.state_dict()
            rows, start = everywhere(seen)[:size], steps.stop
            meant, told = meant + np.mean([row[0] for row in rows], axis=0), told + rows[0][1]
            owed = flat(torch.from_numpy(arrays["e_i"].mean(axis=0) + arrays.get(RESIDUAL, np.zeros(1)).sum(axis=0))
                        for _, arrays in stacks([row[2] for row in rows]))
            np.testing.assert_allclose(told + owed, meant, rtol=0, atol=1e-12)


def flat(tensors):
    return np.concatenate([t.detach().contiguous().view(-1).numpy() for t in tensors])


def reset(folder):
    """Without errors and estimates, but with momenta and counters; a dense first step again."""
    for case, hook in CASES.items():
        old = of(goes_on(3, hook, folder / f"reset {case}", 6), "saved")
        rows = goes_on(2, hook, folder / f"reset {case}", 14, policy="reset")
        seen = set()
        for (_, before), (_, after) in zip(stacks(old), stacks(of(rows, "loaded")), strict=True):
            assert before.keys() == after.keys()
            for key, array in after.items():
                seen |= {key} if before[key].any() else set()
                assert all(same_bits(row, mean_of(before[key])) for row in array) if key == "v_i" else not array.any()
        assert seen == after.keys()
        for row in rows:
            assert (row["start"], row["loaded"]["steps"]) == (6, 6)
            anew = hook["rule"] != "ef14"
            assert {saved["steps"] for saved in row["loaded"]["parameters"].values()} == {0 if anew else 6}
            assert row["notes"] == ("errors, residuals and estimates begin anew, momenta are the mean over the old ranks, "
                                    "of robust rules none",
                                    "hook starts without errors and estimates")
        losses = np.mean(of(rows, "losses"), axis=0)
        assert losses[-5:].mean() < losses[0], (case, losses)


def the_same_world(folder):
    """Go on to the last bit where the selection does not depend on buckets."""
    for rule in ("ef14", "ef21-sgdm"):
        case = {"rule": rule, "compressor": PER_PARAMETER, "dense_steps": 1}
        whole = goes_on(3, case, folder / f"whole {rule}", 10)
        first = goes_on(3, case, folder / f"halves {rule}", 6)
        second = goes_on(3, case, folder / f"halves {rule}", 4, policy="exact")
        for uninterrupted, before, after in zip(whole, first, second, strict=True):
            assert after["start"] == 6
            assert after["notes"] == ()
            assert packed(after["loaded"]) == packed(before["saved"])
            assert after["parameters"] == uninterrupted["parameters"]
            assert packed(after["saved"])["parameters"] == packed(uninterrupted["saved"])["parameters"]


def exact_refuses(folder):
    case, text = CASES["ef21"], None
    goes_on(3, case, folder / "exact", 2)
    if dist.get_rank() < 2:
        model, hook = hooked(2, case, network())
        before = bits(model.parameters())
        try:
            Training(model=model.module, hook=hook).resume(Store(folder / "exact"), hook.comm)
        except OptionError as error:
            text = str(error)
        assert bits(model.parameters()) == before
        assert not hook.state_dict()["parameters"]
    assert everywhere(text)[:2] == ['resume: step 2 was saved by 3 ranks, here there are 2; pass policy="redistribute" or '
                                    '"reset", or start 3 ranks'] * 2


def forgets_while_it_trains(folder):
    for case in ("ef14 sign", "ef21-sgdm", "econtrol two-phase"):
        if dist.get_rank() < 3:
            model, hook = hooked(3, CASES[case], network())
            train(model, range(5))
            sent, saved = hook.sent_nbytes, hook.state_dict()
            before = packed(saved)
            for _ in range(2):  # once with buckets, once when it has been loaded and has none yet
                hook.forget()
                assert (hook.steps, hook.sent_nbytes) == (5, sent)
                for _, arrays in stacks([hook.state_dict()]):
                    assert all(array.any() == (key == "v_i") for key, array in arrays.items())
                assert packed(saved) == before  # what somebody else holds is left alone
                hook.load_state_dict(saved)
            hook.forget()
            losses = train(model, range(5, 20))
            assert np.mean(losses[-5:]) < losses[0]


PROGRAMS = (redistributed, nothing_is_lost, reset, the_same_world, exact_refuses, forgets_while_it_trains)


def rank_main(rank, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="step .* goes on with", category=RuntimeWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    GROUPS.update((size, dist.new_group(range(size))) for size in range(1, RANKS + 1))
    for program in PROGRAMS:
        program(folder)
        dist.barrier()
        if rank == 0:
            print(f"passed {program.__name__}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.start_processes(rank_main, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork")
