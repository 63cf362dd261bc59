# Every target sets itself up: nothing but Python and make is needed.
#
#   make demo         SmolLM2-135M, stock generate() against the patched one
#   make test         the test suite, on CPU, without a network (ARGS="-k blocks" goes to pytest)
#   make test-slow    its slow part: SmolLM2's real weights, servers under load and killed again and again
#   make test-hostile servers under faults, hostile clients and random bytes (HF_PAGED_FULL=1: ten minutes)
#   make test-oldest  the same against the oldest Transformers supported
#   make test-latest  the same against the newest Transformers that the package index has
#   make lint         ruff and mypy
#   make bench        throughput on CPU: hf_paged, Transformers' continuous batching, static batches
#   make wheel        build the wheel into dist/
#   make wheel-test   build it, install it into an empty environment, and generate with it there

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
ARGS ?=
BENCH_ARGS ?= --workload cpu --engine hf_paged,generate_batch,generate --repeats 3

ENV_FILES = pyproject.toml constraints.txt tools/setup_env.py
# One thread for each test process: more of them than cores would only wait for each other.
PYTEST = env HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST_ARGS = -q -n $(JOBS) --dist worksteal --durations 15
FAST = -m "not slow and not hostile"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-hostile test-oldest test-latest lint format bench wheel wheel-test clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/ready
	$(VENV)/bin/hf-paged demo $(ARGS)

test: $(VENV)/ready
	$(PYTEST) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) $(FAST) $(ARGS)

test-slow: $(VENV)/ready
	$(PYTEST) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m slow $(ARGS)

# Alone on the machine: it counts what the server holds, and prints how long clients waited.
test-hostile: $(VENV)/ready
	$(PYTEST) $(VENV)/bin/python -m pytest -q -rP --durations 5 -m hostile tests/server/hostile $(ARGS)

test-oldest: .venv-oldest/ready
	$(PYTEST) .venv-oldest/bin/python -m pytest $(PYTEST_ARGS) $(FAST) $(ARGS)

# What the index has changes by the day: the environment is built anew each time.
test-latest:
	$(PYTHON) tools/setup_env.py .venv-latest --extras test --transformers latest
	$(PYTEST) .venv-latest/bin/python -m pytest $(PYTEST_ARGS) $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(VENV)/ready
	$(VENV)/bin/hf-paged bench throughput $(BENCH_ARGS)

wheel: $(VENV)/ready
	rm -rf dist
	$(VENV)/bin/python -m hatchling build --target wheel --directory dist

wheel-test: wheel
	$(PYTHON) tools/setup_env.py .venv-wheel --wheel dist/hf_paged-*.whl
	cd / && $(CURDIR)/.venv-wheel/bin/python $(CURDIR)/tools/wheel_test.py

$(VENV)/ready: $(ENV_FILES)
	$(PYTHON) tools/setup_env.py $(VENV) --extras dev
	touch $@

.venv-oldest/ready: $(ENV_FILES)
	$(PYTHON) tools/setup_env.py .venv-oldest --extras test --transformers 5.17.0
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-latest .venv-wheel dist
