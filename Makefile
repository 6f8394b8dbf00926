# Everything a fresh clone needs: Python 3.11 or newer, make, and an index to install from.
#
#   make demo        the quick start: a gateway over three simulated engines, a mixed load, one engine killed on the way
#   make test        the tests, as the README runs them (no vLLM needed)
#   make test-pure   the same tests, over the sources as plain Python where compiled modules are there
#   make compile     compiles the modules that pyproject.toml lists again, in place (needs a C compiler)
#   make test-real   installs a real vLLM (CPU) and runs the tests against two of its servers
#   make test-browser  runs the tests of the pages it makes in a real browser: one that is there, or one that it installs
#   make fuzz        any bytes against the server, the client's side and the reading of bodies, FUZZ_SECONDS each (300)
#   make bench       what relaying costs, beside a bare relay, nginx and vllm-router (installs the last into an environment of its own)
#   make peers       routers over the same simulated fleet, over HTTP: ours, vllm-router, sglang-router, nginx; an hour on two cores that do nothing else
#   make compare-all  every router of ours and the rules of others, simulated on the same arrivals, into docs/COMPARISON.md; an hour on two cores, goes on where it was
#   make calibration   calibrates a real vLLM (CPU) and replays work on it and on its model; half an hour on two cores that do nothing else
#   make check       ruff, mypy and the layers contract
#   make wheel       builds the wheel, installs it into an environment of its own and tries it
#   make clean       removes what the others made

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-pure compile test-real browser test-browser fuzz bench peers compare-all calibration check wheel clean

help:
	@sed -n '3,$$ { /^#   /!q; s/^#   //p }' $(firstword $(MAKEFILE_LIST))

# One stamp for each set of extras; an environment is made again only when pyproject.toml or hatch_build.py has changed. Installing compiles
# where there is a C compiler; pip shows nothing of that, so what came of it is printed from where hatch_build.py leaves it.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; name one with PYTHON=..." >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml hatch_build.py
	@echo "installing the package into $(VENV)"
	@$(PIP) install -e .
	@cat build/compiled.log
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made pyproject.toml hatch_build.py
	@echo "installing the package and what its tests need into $(VENV)"
	@$(PIP) install -e '.[test]'
	@cat build/compiled.log
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml hatch_build.py
	@echo "installing the package and its development tools into $(VENV)"
	@$(PIP) install -e '.[dev]'
	@cat build/compiled.log
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

demo: $(VENV)/.installed
	@$(BIN)/control-plane demo $(DEMO_ARGS)

compile: $(VENV)/.installed
	@CONTROL_PLANE_COMPILE=1 $(COMPILE)

# Compiles again when what was compiled has changed; without a compiler nothing was compiled, and there is nothing to do.
COMPILE_CHANGED = $(BIN)/python -P control_plane/compiled.py || { echo "compiling what changed"; $(COMPILE); }
COMPILE = $(PIP) install --no-deps -e . && cat build/compiled.log

test: $(VENV)/.installed-test
	@$(COMPILE_CHANGED)
	cd tests/control_plane && $(BIN)/python -m pytest -v $(PYTEST_ARGS)

test-pure: $(VENV)/.installed-test
	cd tests/control_plane && CONTROL_PLANE_PURE=1 $(BIN)/python -m pytest -v $(PYTEST_ARGS)

test-real: $(VENV)/.installed-test
	@$(COMPILE_CHANGED)
	scripts/real_vllm/install.sh
	cd tests/control_plane && $(BIN)/python -m pytest -v -m real --timeout 300 $(PYTEST_ARGS)

# No step of its own for the browser in `make test`: playwright and a browser are some 500 MB.
browser: $(VENV)/.installed-test
	@$(BIN)/python -c "import playwright" 2>/dev/null || $(PIP) install -e '.[browser]'
	scripts/browser.sh $(BIN)/python

test-browser: browser
	BROWSER_PATH=$$(scripts/browser.sh $(BIN)/python) && export BROWSER_PATH && \
	cd tests/control_plane && $(BIN)/python -m pytest -v -m browser $(PYTEST_ARGS)

FUZZ_SECONDS ?= 300
# Over the sources: what guides atheris is the Python code that an input reaches.
fuzz: $(VENV)/.installed-test
	@$(PIP) install -e '.[fuzz]' || echo "no atheris for this Python: seeds are changed at random instead"
	CONTROL_PLANE_PURE=1 $(BIN)/python tests/control_plane/fuzz/run.py --seconds $(FUZZ_SECONDS)

BENCH_VENV := build/bench-venv
$(BENCH_VENV)/.made:
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check --quiet install vllm-router==0.1.17
	@touch $@

bench: $(VENV)/.installed-dev $(BENCH_VENV)/.made
	@$(COMPILE_CHANGED)
	@command -v nginx /usr/sbin/nginx >/dev/null || { echo "make: nginx is missing (apt-get install nginx-light)" >&2; exit 1; }
	VLLM_ROUTER=$(abspath $(BENCH_VENV))/bin/vllm-router $(BIN)/python benchmarks/gateway.py --json build/bench/gateway.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/decision.py

SGLANG_VENV := build/sglang-venv
$(SGLANG_VENV)/.made:
	@$(PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check --quiet install sglang-router==0.3.2
	@touch $@

# The two tables of docs/PEERS_MEASURED.md, row by row: what was interrupted goes on where it was.
PEERS := VLLM_ROUTER=$(abspath $(BENCH_VENV))/bin/vllm-router SGLANG_ROUTER_PYTHON=$(abspath $(SGLANG_VENV))/bin/python $(BIN)/python benchmarks/peers.py
peers: $(VENV)/.installed-dev $(BENCH_VENV)/.made $(SGLANG_VENV)/.made
	@$(COMPILE_CHANGED)
	@command -v nginx /usr/sbin/nginx >/dev/null || { echo "make: nginx is missing (apt-get install nginx-light)" >&2; exit 1; }
	@mkdir -p build/bench
	$(PEERS) --trace sessions --fleet 8xa100x2-qwen3-32b --rate 10rps --speed 2 --agree \
	  --slo "interactive=ttft:3000,tpot:75,share:0.8;batch=ttft:30000,tpot:200,share:0.2,priority:low" \
	  --ours adaptive+load_balanced,adaptive+affinity \
	  --resume build/bench/peers-sessions.jsonl --json build/bench/peers-sessions.json $(PEERS_ARGS)
	$(PEERS) --trace azure_conv --fleet 8xl40sx2-qwen3-32b --rate 9.2rps --speed 2 --agree \
	  --slo "interactive=ttft:3000,tpot:120,share:0.8;batch=ttft:30000,tpot:300,share:0.2,priority:low" \
	  --peers nginx:least_conn,vllm-router:round_robin,vllm-router:power_of_two,vllm-router:cache_aware,sglang-router:power_of_two,sglang-router:cache_aware \
	  --resume build/bench/peers-azure.jsonl --json build/bench/peers-azure.json $(PEERS_ARGS)

# Interrupted, the same command goes on. COMPARE_ARGS: `--help` of the script tells.
compare-all: $(VENV)/.installed-test
	@$(COMPILE_CHANGED)
	@$(BIN)/python -c "import matplotlib" 2>/dev/null || $(PIP) install -e '.[bench]'
	$(BIN)/python benchmarks/compare_all.py $(COMPARE_ARGS)

calibration: $(VENV)/.installed-test
	@$(COMPILE_CHANGED)
	scripts/real_vllm/install.sh
	$(BIN)/python benchmarks/calibration.py $(CALIBRATION_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Not editable and in an environment of its own: what the tests cannot see is a file missing from the wheel. Compiled where that can be.
wheel: $(VENV)/.installed-dev
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip --disable-pip-version-check --quiet install dist/*.whl
	cd build && wheel-venv/bin/control-plane --help
	cd build && wheel-venv/bin/control-plane --version
	cd build && wheel-venv/bin/control-plane demo --duration-s 4 --seed 1
	cd build && wheel-venv/bin/python -P -c "from control_plane.simulator.page import page_of; assert 'uPlot' in page_of({})"
	cd build && CONTROL_PLANE_PURE=1 wheel-venv/bin/control-plane --version
	cd build && CONTROL_PLANE_PURE=1 wheel-venv/bin/control-plane demo --duration-s 4 --seed 1

clean:
	find control_plane -name '*.so' -delete
	rm -rf *.so control_plane/*.manifest $(VENV) build dist htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
