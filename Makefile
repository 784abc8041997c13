# Two commands do all the set-up: `make repro` and `make test`.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
$(error On Windows use the plain pip and dvc commands of the README)
endif
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: wine repro test test-fast lint clean

repro: $(VENV)/.installed wine
	dvc repro
	@dvc metrics show

test: $(VENV)/.installed wine
	pytest

test-fast: $(VENV)/.installed
	pytest -m "not slow"

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	mypy

# torch first, by ordinary resolution; then exact versions without dependencies, since optimum-intel asks for torchvision,
# whose only builds for Linux need CUDA and break a CPU build of torch.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check torch==2.13.0
	pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The NPU compiler runs on Linux x86-64 under Wine. Without root the build goes on and says what it could not compile.
wine:
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! PATH="$$PATH:/usr/lib/wine" command -v wine64 >/dev/null && ! command -v wine >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends wine64; \
	  else \
	    echo "NPU blobs need Wine: sudo apt-get install --no-install-recommends wine64"; \
	  fi; \
	fi

clean:
	rm -rf $(VENV) artifacts/.locks artifacts/logs artifacts/*/logs
