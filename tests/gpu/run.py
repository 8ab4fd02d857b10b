"""Run the laws of devices on a GPU, then measure: ``make test-gpu``, or ``python tests/gpu/run.py``. Under ten minutes.

Exit status 77, and one line, where there is no GPU that torch can use; 1 where a law fails or a measurement does.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "test-gpu"
PROGRAMS = ("-m", "mpi_ef.jobs.cli")
NO_GPU = 77  # what test programs return that could not run
LAWS = ("kernels", "codecs", "plans", "optimizers", "bus", "waiting", "compile", "checkpoints", "places")  # with kernels
LAWS_SECONDS, SPEED_SECONDS, TRAINING_SECONDS = 360, 120, 100
TRAINING = ("--model", "gpt", "--layers", "8", "--width", "768", "--heads", "12", "--batch", "8", "--steps", "30")


def show(text):
    print(text, flush=True)


def run(command, seconds, environment):
    """Return the exit status of a program that prints; 124 where it took too long."""
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        show(f"not finished within {seconds} s: {' '.join(map(str, command))}")
        return 124


def mpiexec():
    beside = Path(sys.executable).with_name("mpiexec")
    return [str(beside) if beside.exists() else "mpiexec", "-n", "2", sys.executable]


def main():
    if not torch.cuda.is_available():
        show(f"make test-gpu: torch {torch.__version__} finds no GPU; nothing was run. Take a machine with one, and a torch "
             "for it: make test-gpu GPU_PYTHON=...")
        return NO_GPU
    device = os.environ.get("MPI_EF_TEST_DEVICE", "cuda:0")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"MPI_EF_TEST_DEVICE": device, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("TRITON_INTERPRET", None)
    show(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; laws of tests/test_device_*.py on {device}")
    files = [*(f"tests/test_device_{of}.py" for of in LAWS), "tests/launch/test_devices.py"]
    pytest = [sys.executable, "-m", "pytest", "-q", "--durations=10", "-n", "4", "--dist", "loadgroup", *files]
    ends = {"laws": run(pytest, LAWS_SECONDS, environment),
            "speed": run([*mpiexec(), *PROGRAMS, "bench", "--device", device, "--json", OUT / "bench.json"], SPEED_SECONDS,
                         environment)}
    train = [*mpiexec(), *PROGRAMS, "train", "--device", device, *TRAINING, "--overwrite", "--out", OUT / "train"]
    show("\nmpi-ef train, a GPT of 57 million parameters, 2 ranks on one GPU; goal: encode, communicate and decode are at "
         "most 10 % of a step")
    ends["training"] = run(train, TRAINING_SECONDS, environment)
    show("")
    for name, status in ends.items():
        show(f"{name}: {f'FAILED, status {status}' if status else 'passed'}")
    return int(any(ends.values()))


if __name__ == "__main__":
    sys.exit(main())
