# Two commands do all the set-up: `make repro` and `make test`.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
$(error On Windows use the plain pip and dvc commands of the README)
endif
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: wine directml chromium docker-registry repro models variants validations test test-fast lint audit bench bench-cluster bench-fidelity bench-width clean

repro: variants
	dvc repro
	@dvc metrics show

# Much of a build keeps only one core busy, so stages whose speed is not measured run two at a time, each on one core,
# since OpenMP's threads wait for each other by spinning. A later `dvc repro` builds what is still missing, or fails.
two_at_a_time = -dvc stage list --name-only $(1) | OMP_NUM_THREADS=1 xargs -P 2 -n 1 dvc --wait-for-lock repro --single-item

# Stages that other stages need run first.
models: $(VENV)/.installed
	dvc repro download
	$(call two_at_a_time,calibrate export_openvino $(beside))
	$(call two_at_a_time,build_onnx quantize_openvino)

variants: beside = reference
variants: models wine

# CI runs this target, since it does not need the measured speeds.
validations: variants
	$(call two_at_a_time,validate)

test: $(VENV)/.installed wine chromium docker-registry
	pytest -n 2 --dist worksteal

test-fast: $(VENV)/.installed
	pytest -m "not slow"

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	mypy

# A known vulnerability of an installed package is an error; a service that cannot be reached only prints a message.
audit: $(VENV)/.installed
	@pip-audit --skip-editable --progress-spinner off > $(VENV)/audit.txt 2>&1 || { ! grep -A99 "known vulnerabilit" $(VENV)/audit.txt; }
	@echo "$$(grep -c 'could not be audited' $(VENV)/audit.txt) packages could not be audited; $$(grep -o 'No known vulner.*' $(VENV)/audit.txt || tail -n 1 $(VENV)/audit.txt)"

bench: $(VENV)/.installed
	dvc repro download
	python -m bench.full_size

bench-cluster: $(VENV)/.installed
	dvc repro download
	python -m bench.cluster

bench-fidelity: $(VENV)/.installed
	dvc repro validate
	python -m bench.fidelity

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

clean:
	rm -rf $(VENV) artifacts/.locks artifacts/logs
