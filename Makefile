# Two commands do all the set-up: `make repro` and `make test`.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
$(error On Windows use the plain pip and dvc commands of the README)
endif
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test test-fast lint clean

repro: $(VENV)/.installed
	dvc repro
	@dvc metrics show

test: $(VENV)/.installed
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

clean:
	rm -rf $(VENV) artifacts/.locks artifacts/logs artifacts/*/logs
