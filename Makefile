# make demo | make test | make lint | make install | make clean
# Needs Python 3.10 or newer and make; no GPU, no compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where torch comes from: PyPI's Linux wheels bring gigabytes of CUDA packages. For CUDA: make install TORCH_INDEX=https://pypi.org/simple
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

export DS_BUILD_OPS := 0

.PHONY: install demo test lint clean

install: $(STAMP)

# torch first and alone, so that the next line finds it there; the constraints go with every install.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("dpo_ds needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another one with make PYTHON=...")'
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --extra-index-url $(TORCH_INDEX) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,lora]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m dpo_ds.demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find dpo_ds tests -name __pycache__ -type d -prune -exec rm -rf {} +
