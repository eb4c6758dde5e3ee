# make train   a policy learns by resets on this machine's CPU (no downloads of weights or data)
# make test    unit, parallel and end-to-end tests
# make test-slow   what takes too long for every change
# make claims  where resets pay, by this project's own loop: hours of a CPU; stop it and go on as you like
# make check   lint, types, architecture, unit tests
#
# make train ARGS="algorithm.resets=none run_dir=runs/grpo" passes overrides on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG := examples/chain_arithmetic_cpu.yaml
ARGS ?=
# Files go to two processes, in the order in which they are collected.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS := 1

.PHONY: train test test-slow claims check lint lint-page mutate clean

train: data/chain_arithmetic/DONE runs/chain_arithmetic_warm_start/hf/config.json
	$(BIN)/megatron-srpo train $(CONFIG) $(ARGS)

data/chain_arithmetic/DONE: | $(VENV)/installed
	$(BIN)/python examples/chain_arithmetic.py data/chain_arithmetic

runs/chain_arithmetic_warm_start/hf/config.json: | data/chain_arithmetic/DONE
	rm -rf runs/chain_arithmetic_warm_start
	$(BIN)/megatron-srpo sft $(CONFIG)

test: $(VENV)/installed
	$(BIN)/python -m pytest tests $(TOGETHER)

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest tests -m slow

claims: $(VENV)/installed
	$(BIN)/python tools/claims.py $(ARGS)

check: lint
	$(BIN)/python -m pytest tests/unit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The page's scripts are what they are, unbuilt; this checks their types, and needs node.
lint-page:
	npm install --silent --no-save --prefix .page typescript@5.9.3 uplot@1.6.32
	.page/node_modules/.bin/tsc -p megatron_srpo/report/jsconfig.json

mutate: $(VENV)/installed
	$(BIN)/python tools/mutate.py

# PyPI has only CUDA builds of torchvision, torchaudio and torchcodec, which vLLM's packages ask
# for and its text path does not need: beside a CPU build of torch each of them breaks the import.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[cpu,dev]"
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) .page data runs
