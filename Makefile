# Everything a fresh machine needs is python >= 3.10 and make: each target sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Threads that spin while they wait for others are slower than one thread on a machine that is shared.
PASSIVE := OMP_WAIT_POLICY=passive

.PHONY: demo test test-all check docs bench aot gpu gpu-dist

# Without the CUDA engine, which takes minutes to build: its tests compile what they need.
$(READY): requirements-dev.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	PAIRLOSS_CUDA=0 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(READY)
	$(PASSIVE) $(BIN)/pairloss demo --out out

# Triton reads TRITON_INTERPRET when it decorates a kernel, so its tests are a process of their own.
test: $(READY)
	$(BIN)/python -m pytest -n auto tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests -m "engines and not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -n auto tests -m "slow or not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests -m engines

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/. A warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m pytest bench --benchmark

# Machine code for GPUs that need not be there: registers, spills. Takes half an hour.
aot: $(READY)
	$(BIN)/python bench/aot.py
	$(BIN)/python bench/cuda_aot.py

# For a machine with a GPU: the interpreter that is there, no network, no virtual environment. PART="tests peers": those alone.
gpu:
	$(PYTHON) bench/gpu.py $(if $(PART),--part $(PART))

# For a machine with several GPUs, likewise.
gpu-dist:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) -m pytest tests/test_distributed.py -m "slow or not slow"
	for loss in snnl clip siglip; do for strategy in gather ring; do \
	    $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node gpu bench/ranks.py --device cuda \
	        --loss $$loss --strategy $$strategy --rows 131072 --columns 768 --dtype bfloat16 || exit 1; \
	done; done
