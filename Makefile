# Two commands do all the set-up: `make repro` and `make test`.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
$(error On Windows use the plain pip and dvc commands of the README)
endif
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: wine directml chromium docker-registry compilers repro models test test-fast coverage mutants lint audit bench bench-rehearsal bench-cluster bench-fidelity bench-peers bench-width clean

repro: $(VENV)/.installed wine
	dvc repro
	@python -m pipeline.graph # a full disk of DVC's cache is no error to `dvc repro`
	@dvc metrics show

# Build the variants with two cells at a time, each on one core. At full size this is faster than `dvc repro`, which builds
# one after the other: much of a data-free build keeps only one core busy.
models: $(VENV)/.installed
	dvc repro calibrate
	dvc stage list --name-only build_onnx quantize_openvino | OMP_NUM_THREADS=1 xargs -P 2 -n 1 dvc --wait-for-lock repro --single-item

# Three processes keep two cores busy, since some slow tests wait for servers or moments; fast ones do not. OpenMP's threads
# wait for each other by spinning, so each test gets one. All tests of a file run in one process, which makes the file's
# fixtures once.
PYTEST := pytest --dist loadscope --no-loadscope-reorder -n

test: $(VENV)/.installed wine chromium docker-registry compilers
	OMP_NUM_THREADS=1 $(PYTEST) 3

test-fast: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PYTEST) 2 -m "not slow"

# Run all tests and say which lines of the code they never reach.
coverage: $(VENV)/.installed wine chromium docker-registry compilers
	OMP_NUM_THREADS=1 coverage run -m $(PYTEST) 3
	coverage combine --quiet
	coverage report

# Change the code in ways that a test must notice: first as tests/mutations.yaml says (10 minutes), then in every place of
# the modules that pyproject.toml names (an hour). docs/promises.md says what is known to survive.
mutants: $(VENV)/.installed wine docker-registry
	dvc repro
	OMP_NUM_THREADS=1 pytest tests/mutants.py
	OMP_NUM_THREADS=1 mutmut run --max-children 2
	mutmut results

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	mypy

audit: $(VENV)/.installed
	python .ci/audit.py

bench: $(VENV)/.installed
	dvc repro download
	python -m bench.full_size

# Run every stage with the default recipes at Phi-3-mini's full size: two hours, 65 GB of disk and 12 GB of memory.
bench-rehearsal: $(VENV)/.installed wine
	dvc repro download
	python -m bench.rehearsal

bench-cluster: $(VENV)/.installed
	dvc repro download
	python -m bench.cluster

bench-fidelity: $(VENV)/.installed
	dvc repro validate
	python -m bench.fidelity

# OpenMP's threads wait by spinning, so that work beside them would slow some of the tools far more than others: each gets one.
bench-peers: $(VENV)/.installed
	dvc repro reference calibrate
	OMP_NUM_THREADS=1 python -m bench.peers

bench-width: $(VENV)/.installed
	dvc repro download
	python -m bench.full_width

# Most installed modules are never imported, so pip compiles none of them. Python compiles a module at its first import
# and must keep the result, so PYTHONDONTWRITEBYTECODE is not passed on.
unexport PYTHONDONTWRITEBYTECODE
PIP_OPTIONS := --quiet --disable-pip-version-check --no-compile

# torch comes first, with its dependencies; then exact versions are installed without dependencies, since optimum-intel
# asks for torchvision, whose only builds for Linux need CUDA and break a CPU build of torch.
$(VENV)/.installed: requirements.lock libraries.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	pip install $(PIP_OPTIONS) $$(grep ^torch== libraries.lock)
	pip install $(PIP_OPTIONS) --no-deps -r requirements.lock
	pip install $(PIP_OPTIONS) --no-deps --editable .
	touch $@

# Install Debian packages that pip cannot provide. Without root, print the command to run instead, and go on.
define apt
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1); \
else \
  echo "$(2): sudo apt-get install --no-install-recommends $(1)"; \
fi
endef

# The NPU compiler runs on Linux x86-64 under Wine.
wine:
	@[ "$$(uname -sm)" != "Linux x86_64" ] || { PATH="$$PATH:/usr/lib/wine" command -v wine64 || command -v wine; } >/dev/null || $(call apt,wine64,NPU blobs need Wine)

# After this, `validate` runs the DirectML model on DirectML, in software. The set-up is needed once; it takes 85 s and
# 1.8 GB of the user's cache.
directml: $(VENV)/.installed
	@[ "$$(uname -sm)" != "Linux x86_64" ] || command -v debootstrap >/dev/null || $(call apt,debootstrap debian-archive-keyring,DirectML in software needs a chroot)
	python -m pipeline.check.directml

chromium:
	@{ command -v chromium || command -v google-chrome; } >/dev/null || $(call apt,chromium,The tests of the report need Chromium)

docker-registry:
	@command -v docker-registry >/dev/null || $(call apt,docker-registry,The tests of OCI registries need a registry)

compilers:
	@{ command -v g++ && command -v mcs && command -v mono; } >/dev/null || $(call apt,g++ mono-mcs mono-runtime libmono-system-web4.0-cil,The tests of the examples need compilers of C++ and C#)

clean:
	rm -rf $(VENV) artifacts/.locks artifacts/logs
