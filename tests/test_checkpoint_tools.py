"""The tools of ``mpi-ef checkpoint``: what they tell of whole and damaged checkpoints, and what other programs get."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import patience
import pytest
import torch
from checkpoint_cases import own, save, shared
from test_checkpoint_store import fill_all_but
from virtual import results

from mpi_ef import checkpoint
from mpi_ef.checkpoint import BFLOAT16, Store, open_checkpoint
from mpi_ef.compress import TopK
from mpi_ef.errors import CheckpointError, OptionError
from mpi_ef.jobs import checkpoint as tools
from mpi_ef.jobs.cli import main
from mpi_ef.optim import DistributedOptimizer
from mpi_ef.state.export import export, model_state
from mpi_ef.state.training import Training

BRAIN = torch.bfloat16


class Net(torch.nn.Module):
    """Parameters in 16 bits, which have masters; buffers that differ between ranks, and one that numpy does not have."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4).to(BRAIN)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("brain", torch.tensor([1.0, -2.5, float("nan")], dtype=BRAIN))


def trained(folder, step, n=2):
    """Save a training of `n` virtual ranks; return the models."""

    def program(comm):
        net = Net()
        with torch.no_grad():
            for number, p in enumerate(net.parameters()):
                p.copy_(torch.linspace(-1.0, 1.0, p.numel()).reshape(p.shape) / (number + step))
        optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.5))
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.01 * (comm.Get_rank() + step))
        optimizer.step()
        net.norm.running_mean.fill_(comm.Get_rank() + 0.5)
        net.norm.num_batches_tracked.fill_(7 + comm.Get_rank())
        Training(model=net, optimizer=optimizer, random=False).save(Store(folder), comm, step)
        return net, optimizer.flat.values.copy()

    return results(n, program)


def call(capsys, *arguments):
    """Run a tool and return its exit status and what it printed."""
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out + captured.err


def flip(path, array):
    """Flip a bit of an array in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(array.tobytes()) + 1] ^= 16
    path.write_bytes(content)


def test_ls_tells_what_is_whole_and_what_is_not(tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3, 20):
        save(folder, step, 2, keep_last=9)
    (folder / "step-00000002" / "BAD").write_text("a bit was flipped\n")
    (folder / "step-00000003" / "rank-00001.h5").unlink()
    (folder / ".tmp-step-00000030-abc").mkdir()
    (folder / "step-00000001").rename(folder / ".old-step-00000001-0f")
    status, text = call(capsys, "ls", tmp_path / "run")
    assert status == 0
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "2", "3", "20", "30"]
    states = (
        "replaced",
        "damaged: a bit was flipped",
        "damaged: rank-00001.h5 is missing",
        "whole",
        "unfinished: is being",
    )
    for line, state in zip(lines[1:], states, strict=True):
        assert state in line, text
    status, listed = call(capsys, "ls", folder, "--json")
    assert [(row["step"], row["world_size"]) for row in json.loads(listed)] == [
        (1, 2), (2, 2), (3, None), (20, 2), (30, None),
    ]
    assert call(capsys, "ls", tmp_path)[1].endswith("no checkpoints\n")
    status, text = call(capsys, "ls", tmp_path / "nowhere")
    assert status == 2
    assert "nowhere: No such file or directory; give a folder" in text
    assert text.count("\n") == 1


def test_verify_finds_a_flipped_bit(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step, 3)
    assert call(capsys, "verify", tmp_path)[0] == 0
    flip(tmp_path / "step-00000002" / "rank-00001.h5", own(1, 2)["e_i"])
    status, text = call(capsys, "verify", tmp_path)
    assert status == 1
    assert "step-00000001: good" in text
    assert "step-00000002: BAD: rank-00001.h5: the bytes of per_rank 'e_i' are not those" in text
    assert not list(tmp_path.glob("step-*/BAD"))  # looking changes nothing
    (tmp_path / "step-00000001" / "BAD").write_text("somebody said so")
    status, text = call(capsys, "verify", tmp_path / "step-00000001")
    assert (status, "before BAD is removed" in text) == (1, True)
    status, text = call(capsys, "verify", tmp_path / "step-00000002", "--json")
    assert status == 1
    assert len(json.loads(text)[0]["problems"]) == 1
    (tmp_path / "step-00000002" / "COMMIT").unlink()
    status, text = call(capsys, "verify", tmp_path / "step-00000002")
    assert (status, "COMMIT is missing" in text) == (1, True)
    status, text = call(capsys, "verify", tmp_path / "step-00000003")
    assert status == 1
    assert "step-00000003" in text
    assert call(capsys, "verify", tmp_path.parent / "empty")[0] == 2


@pytest.mark.parametrize("replaced", [False, True])
def test_what_its_run_removes_meanwhile_is_not_damaged(tmp_path, capsys, monkeypatch, replaced):
    """`verify` of a run that trains ended with status 1, and `ls` showed what was not there any more."""
    for step in (1, 2, 3):
        save(tmp_path, step, 1)
    opened, path = checkpoint.open_checkpoint, tmp_path / "step-00000002"

    def late(asked):
        if asked == path and path.exists():
            save(tmp_path, 2, 1) if replaced else shutil.rmtree(path)
            raise CheckpointError(f"{path}: unreadable: COMMIT: No such file or directory; use another checkpoint")
        return opened(asked)

    found = tools._checkpoints(tmp_path, "whole")
    monkeypatch.setattr(tools, "_checkpoints", lambda *_: found)
    monkeypatch.setattr(checkpoint, "open_checkpoint", late)
    status, text = call(capsys, "verify", tmp_path)
    assert (status, text.count(": good, ")) == (0, 2)
    assert f"{path}: its run has removed or replaced it meanwhile\n" in text
    save(tmp_path, 2, 1)
    status, text = call(capsys, "verify", "--json", tmp_path)
    assert (status, len(json.loads(text))) == (0, 2)
    save(tmp_path, 2, 1)
    if not replaced:
        assert [each.step for each in tools.found_in(tmp_path)] == [1, 3]


def test_inspect_tells_arrays_and_numbers(tmp_path, capsys):
    trained(tmp_path, 4)
    status, text = call(capsys, "inspect", tmp_path)
    assert status == 0
    assert "optimizer" in text
    assert "ef14" in text
    assert "compressor           TopK(ratio=0.5" in text
    for line in ("4 x 3", "model.linear.weight", "of rank 0 alone", "ranks    2"):
        assert line in text, text
    told = json.loads(call(capsys, "inspect", tmp_path, "--values", "--json", "--rank", 1)[1])
    rows = {row["name"]: row for row in told["replicated"] + told["per_rank"]}
    assert rows["model.brain"]["dtype"] == "bfloat16"
    assert rows["model.brain"]["non_finite"] == 1
    assert (rows["model.brain"]["min"], rows["model.brain"]["max"]) == (-2.5, 1.0)
    assert rows["model.norm.running_mean"]["norm"] == pytest.approx(3.0)  # four times 1.5, on rank 1
    assert "3 NaN" not in call(capsys, "inspect", tmp_path, "--values")[1]
    status, text = call(capsys, "inspect", tmp_path, "--rank", 5)
    assert (status, "ask for ranks 0 to 1" in text) == (2, True)
    everything = save(tmp_path / "any", 1, 2)
    assert call(capsys, "inspect", everything, "--values")[0] == 0


def test_diff_names_what_differs(tmp_path, capsys):
    a, b = save(tmp_path / "a", 5, 2), save(tmp_path / "b", 5, 2)
    status, text = call(capsys, "diff", a, a)
    assert (status, f"{len(shared()) + len(own(0)) + len(own(1))} arrays equal bit for bit, 0 not" in text) == (0, True)
    status, text = call(capsys, "diff", a, b)
    assert status == 0
    assert "0 not; 0 other differences\n1 in run, times or versions, which do not count" in text
    assert "checkpoint: run: " in text

    def program(comm):
        x = np.arange(8, dtype=np.float64)
        x[3] += 0.5
        Store(tmp_path / "c").save(comm, 6, replicated={"x": x}, per_rank={"e": x[: 3 + comm.Get_rank()].copy()},
                                   document={"lr": 0.1, "old": 1}, rank_document=comm.Get_rank())
        x[3], x[4] = 3.0, np.nan
        Store(tmp_path / "d").save(comm, 7, replicated={"x": x, "y": x}, per_rank={"e": x[:3].copy()},
                                   document={"lr": 0.2}, rank_document=comm.Get_rank())

    results(2, program)
    told = json.loads(call(capsys, "diff", tmp_path / "c", tmp_path / "d", "--json")[1])
    found = {(row["where"], row["name"]): row for row in told["differences"]}
    assert found["replicated", "x"]["entries"] == 2
    assert found["replicated", "y"]["text"] == "only in the second"
    assert found["replicated", "document.lr"]["text"] == "0.1 and 0.2"
    assert found["replicated", "document.old"]["text"] == "only in the first"
    assert found["rank 1", "e"]["text"] == "float64 (4,) and float64 (3,)"
    assert ("rank 0", "e") not in found
    assert told["same"] == 1
    text = call(capsys, "diff", tmp_path / "c", save(tmp_path / "e", 1, 3))[1]
    assert "another number of them" in text


def test_times_and_versions_do_not_count(tmp_path, capsys):
    def saved(name, **told):
        def program(comm):
            document = {"values": {"seconds": {"all": told.get("all", 1.0)}, "untimed": [3, told.get("all", 2.0)]},
                        "versions": {"torch": "2"}, "steps": 3}
            return Store(tmp_path / name).save(comm, 1, replicated={}, per_rank={}, document=document | told,
                                               rank_document={"wait_seconds": told.get("all", 0.0)})

        return results(1, program)[0]

    a = saved("a")
    status, text = call(capsys, "diff", a, saved("b", all=9.5, all_seconds=2.0, versions={"numpy": "3"}))
    assert status == 1, text  # "all" itself is none of them
    assert "1 other differences\n7 in run, times or versions" in text
    status, text = call(capsys, "diff", a, saved("c", versions={"torch": "3"}), "--json")
    rows = json.loads(text)["differences"]
    assert (status, [row["counts"] for row in rows]) == (0, [False, False])


def test_a_difference_is_measured(tmp_path, capsys):
    first, second = trained(tmp_path / "a", 1)[0][1], trained(tmp_path / "b", 2)[0][1]
    told = json.loads(call(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json")[1])
    found = {row["name"]: row for row in told["differences"]}["model.linear.weight"]
    x, y = first[:12].astype(float), second[:12].astype(float)
    assert found["largest"] == pytest.approx(np.abs(x - y).max())
    assert found["relative"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))


@pytest.mark.parametrize("end", ["safetensors", "h5"])
def test_the_model_for_other_programs(tmp_path, capsys, end):
    (net, masters), _ = trained(tmp_path / "run", 3)
    out = tmp_path / f"model.{end}"
    out.write_text("an older one")
    status, text = call(capsys, "export", tmp_path / "run", out)
    assert status == 0, text
    assert text.startswith("8 arrays of step 3")
    if end == "h5":
        with h5py.File(out) as file:
            assert file.attrs["step"] == 3
            assert file["brain"].attrs["dtype"] == "bfloat16"
            assert all(dataset.chunks is None for dataset in file.values())
            state = {name: torch.from_numpy(np.asarray(dataset[()])) for name, dataset in file.items()}
    else:
        state = pytest.importorskip("safetensors.torch").load_file(out)
        assert state["brain"].dtype is BRAIN
    fresh = Net().to(torch.float32)
    fresh.load_state_dict(state)
    assert state["brain"].float().equal(net.brain.float()) is False  # NaN is not equal to itself
    assert state["brain"][:2].tolist() == [1.0, -2.5]
    assert np.concatenate([p.detach().numpy().reshape(-1) for p in fresh.parameters()]).tobytes() == masters.tobytes()
    assert fresh.norm.running_mean.tolist() == [1.0] * 4  # the mean of 0.5 and 1.5
    assert fresh.norm.num_batches_tracked.item() == 7  # of rank 0
    Net().to(torch.float32).load_state_dict(model_state(open_checkpoint(tmp_path / "run" / "step-00000003")))
    assert not list(tmp_path.glob(".*"))


def test_everything_for_other_programs(tmp_path):
    path = save(tmp_path / "run", 5, 3)
    checkpoint = open_checkpoint(path)
    wanted = {f"replicated/{name}": checkpoint.replicated(name) for name in checkpoint.replicated_names()}
    for rank in range(3):
        wanted |= {
            f"rank-{rank:05d}/{name}": checkpoint.per_rank(name, rank) for name in checkpoint.per_rank_names(rank)
        }
    assert export(checkpoint, tmp_path / "all.h5", everything=True) == len(wanted)
    with h5py.File(tmp_path / "all.h5") as file:
        assert json.loads(file["documents/replicated"][()]) == checkpoint.document
        assert json.loads(file["documents/rank-00002"][()]) == checkpoint.rank_document(2)
        for name, array in wanted.items():
            group, _, rest = name.partition("/")
            dataset = file[group][rest.replace("%", "%25").replace("/", "%2F")]
            if array.dtype == BFLOAT16:
                assert (dataset[()].view(np.uint32) >> 16 == array.view(np.uint16)).all()
                assert dataset.attrs["dtype"] == "bfloat16"
            else:
                assert dataset[()].tobytes() == array.tobytes(), name
                assert dataset.shape == array.shape


def test_everything_as_safetensors(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    trained(tmp_path / "run", 3)
    checkpoint = open_checkpoint(tmp_path / "run" / "step-00000003")
    export(checkpoint, tmp_path / "all.safetensors", everything=True)
    state = load_file(tmp_path / "all.safetensors")
    name = "optimizer.e_i"
    assert state[f"rank-00001/{name}"].numpy().tobytes() == checkpoint.per_rank(name, 1).tobytes()
    assert len(state) == len(checkpoint.replicated_names()) + sum(len(checkpoint.per_rank_names(r)) for r in range(2))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
@pytest.mark.parametrize("name", ["all.safetensors", "all.h5"])
def test_exports_are_for_those_who_may_read_other_files(tmp_path, name, umask, mode):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    trained(tmp_path / "run", 3)
    checkpoint = open_checkpoint(tmp_path / "run" / "step-00000003")
    before = os.umask(umask)
    try:
        export(checkpoint, tmp_path / name, everything=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_exports_that_cannot_be(tmp_path, capsys, monkeypatch):
    path = save(tmp_path / "run", 5, 2)
    for out, told in (("x.pt", "end it in .safetensors or .h5"), ("x.h5", "no model that mpi_ef.Training saved"),
                      ("no/where/x.h5", "no model")):
        status, text = call(capsys, "export", path, tmp_path / out)
        assert status == 2
        assert told in text
        assert text.count("\n") == 1
    with pytest.raises(CheckpointError, match="cannot be written"):
        export(open_checkpoint(path), tmp_path / "no" / "where.h5", everything=True)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(OptionError, match="pip install safetensors"):
        export(open_checkpoint(path), tmp_path / "x.safetensors", everything=True)
    with pytest.raises(OptionError, match="no model"):
        model_state(open_checkpoint(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("values", [3, ["model.x"], {"model.x": {"~": "tensor"}}, {"model.x": 7}])
def test_a_strange_document_is_one_line(tmp_path, capsys, values):
    document = {"values": values, "parts": {}}
    results(1, lambda comm: Store(tmp_path / "run").save(comm, 1, replicated={}, per_rank={}, document=document,
                                                         rank_document={"values": {}}))
    status, text = call(capsys, "export", tmp_path / "run", tmp_path / "x.h5")
    assert (status, text.count("\n")) == (2, 1), text
    assert "export everything instead" in text


def test_damage_leaves_no_export(tmp_path):
    trained(tmp_path / "run", 3)
    path = tmp_path / "run" / "step-00000003"
    checkpoint = open_checkpoint(path)
    flip(path / "rank-00001.h5", checkpoint.per_rank("optimizer.e_i", 1))
    with pytest.raises(CheckpointError, match="are not those that were written"):
        export(open_checkpoint(path), tmp_path / "x.h5", everything=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("end", ["safetensors", "h5"])
def test_a_full_disk_keeps_the_older_export(tmp_path, end):
    if end == "safetensors":
        pytest.importorskip("safetensors")
    values = np.random.default_rng(0).standard_normal(100_000)
    results(1, lambda comm: Store(tmp_path / "run").save(comm, 1, replicated={"x": values}, per_rank={}, document=None,
                                                         rank_document=None))
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is refused here: {mounted.stderr.strip()}")
    out = disk / f"x.{end}"
    try:
        out.write_text("older")
        for free in (100, 20, 2, 0):
            fill_all_but(disk, free * 4096)
            with pytest.raises(CheckpointError, match=r"No space left|take another place"):
                export(open_checkpoint(tmp_path / "run" / "step-00000001"), out, everything=True)
            assert sorted(p.name for p in disk.iterdir()) == ["ballast", out.name]
            assert out.read_text() == "older"
            (disk / "ballast").unlink()
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.slow
def test_without_mpi(tmp_path):
    """On a login node, where mpi4py may find no library."""
    trained(tmp_path / "run", 3)
    out = tmp_path / "model.h5"
    for arguments in (["ls", tmp_path / "run"], ["verify", tmp_path / "run"], ["inspect", tmp_path / "run"],
                      ["diff", tmp_path / "run", tmp_path / "run"], ["export", tmp_path / "run", out]):
        words = ["checkpoint", *map(str, arguments)]
        code = f"import sys; sys.modules['mpi4py'] = None; from mpi_ef.jobs.cli import main; main({words})"
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=patience.limit(120)
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert out.exists()


def test_columns_stand_in_line():
    text = tools._aligned([("a", "bb", "c"), ("aaa", "b", "cc")], left=1)
    assert text.splitlines() == ["  a  bb  c", "aaa   b  cc"]
    assert Path(tools.__file__).name == "checkpoint.py"


def test_where_there_is_no_checkpoint(tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".tmp-step-00000005-aaaaaaaaaaaa").mkdir(parents=True)
    for words in (["inspect", tmp_path / "run"], ["verify", tmp_path / "run"]):
        status, text = call(capsys, *words)
        assert status == 2
        assert text == f"mpi-ef: {tmp_path / 'run'}: has no checkpoint; mpi-ef checkpoint ls tells what is there\n"
