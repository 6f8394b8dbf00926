# Everything a fresh clone needs: Python 3.11 or newer, make, and an index to install from.
#
#   make demo        the quick start: a gateway over three simulated engines, a mixed load, one engine killed on the way
#   make test        the tests, as the README runs them (no vLLM needed)
#   make test-real   installs a real vLLM (CPU) and runs the tests against two of its servers
#   make fuzz        any bytes against the server, the client's side and the reading of bodies, FUZZ_SECONDS each (300)
#   make bench       what relaying costs, beside a bare relay, nginx and vllm-router (installs the last into an environment of its own)
#   make check       ruff, mypy and the layers contract
#   make wheel       builds the wheel, installs it into an environment of its own and tries it
#   make clean       removes what the others made

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-real fuzz bench check wheel clean

help:
	@sed -n '3,$$ { /^#   /!q; s/^#   //p }' $(firstword $(MAKEFILE_LIST))

# One stamp for each set of extras; an environment is made again only when pyproject.toml has changed.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; name one with PYTHON=..." >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	@echo "installing the package into $(VENV)"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made pyproject.toml
	@echo "installing the package and what its tests need into $(VENV)"
	@$(PIP) install -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml
	@echo "installing the package and its development tools into $(VENV)"
	@$(PIP) install -e '.[dev]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

demo: $(VENV)/.installed
	@$(BIN)/control-plane demo $(DEMO_ARGS)

test: $(VENV)/.installed-test
	cd tests/control_plane && $(BIN)/python -m pytest -v $(PYTEST_ARGS)

test-real: $(VENV)/.installed-test
	scripts/real_vllm/install.sh
	cd tests/control_plane && $(BIN)/python -m pytest -v -m real --timeout 300 $(PYTEST_ARGS)

FUZZ_SECONDS ?= 300
fuzz: $(VENV)/.installed-test
	@$(PIP) install -e '.[fuzz]' || echo "no atheris for this Python: seeds are changed at random instead"
	$(BIN)/python tests/control_plane/fuzz/run.py --seconds $(FUZZ_SECONDS)

BENCH_VENV := build/bench-venv
$(BENCH_VENV)/.made:
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check --quiet install vllm-router==0.1.17
	@touch $@

bench: $(VENV)/.installed-dev $(BENCH_VENV)/.made
	@command -v nginx /usr/sbin/nginx >/dev/null || { echo "make: nginx is missing (apt-get install nginx-light)" >&2; exit 1; }
	VLLM_ROUTER=$(abspath $(BENCH_VENV))/bin/vllm-router $(BIN)/python benchmarks/gateway.py --json build/bench/gateway.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/decision.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Not editable and in an environment of its own: what the tests cannot see is a file missing from the wheel.
wheel: $(VENV)/.installed-dev
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip --disable-pip-version-check --quiet install dist/*.whl
	cd build && wheel-venv/bin/control-plane --help
	cd build && wheel-venv/bin/control-plane demo --duration-s 4 --seed 1

clean:
	rm -rf $(VENV) build dist htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
