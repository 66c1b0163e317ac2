# make demo | make sentiment | make test | make test-cluster | make bench | make faults N=20 | make lint | make install | make clean
# Needs Python 3.10 or newer and make; no GPU, no compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# PyPI's Linux wheel of torch brings gigabytes of CUDA packages. Without a GPU, PyTorch's index of CPU wheels saves them:
# make install TORCH_INDEX=<its URL>
TORCH_INDEX ?=

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export DS_BUILD_OPS := 0

.PHONY: install demo sentiment sentiment-small test test-cluster bench faults lint clean

install: $(STAMP)

# torch first, so that the next line finds it there; the constraints go with every install.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "dpo_ds needs Python 3.10 or newer; name one with: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) -e '.[dev,lora]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m dpo_ds.demo

# Reward against KL of every loss, three seeds (launch_scripts/recipes/sentiment); killed, it goes on where it was.
sentiment: $(STAMP)
	$(BIN)/python -m launch_scripts.recipes.sentiment $(ARGS)

# The same in miniature, as a test.
sentiment-small: $(STAMP)
	$(BIN)/python -m pytest tests/experiments --timeout 900 --capture no

# Tests of one process two at a time, file by file; then those that start two ranks, which have both cores to themselves.
test: $(STAMP)
	$(BIN)/python -m pytest -m 'not distributed' --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m distributed

# A real Slurm, sshd and pdsh on two hosts that are namespaces of this machine; as root it installs what is missing. The
# tests skip, and say why, where that cannot be.
CLUSTER := slurm-wlm munge pdsh openssh-server openssh-client shellcheck iproute2
test-cluster: $(STAMP)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(CLUSTER) >/dev/null 2>&1; then \
		{ apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(CLUSTER); } || \
		echo "not installed: what the tests need of $(CLUSTER)"; \
	fi
	$(BIN)/python -m pytest tests/two_hosts --timeout 600

# Steps of ours against TRL's, on the CPU in some minutes, on all GPUs where there are any: make bench ARGS="--out bench.json"
bench: $(VENV)/.bench
	$(BIN)/python tests/benchmarks/train_throughput.py $(ARGS)

$(VENV)/.bench: $(STAMP)
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@

# Breaks a two-rank job N times in random ways and compares what resumes with the undisturbed run.
N ?= 20
faults: $(STAMP)
	$(BIN)/python -m tests.faults $(N)

lint: $(STAMP)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find dpo_ds tests -name __pycache__ -type d -prune -exec rm -rf {} +
