# make demo | test | test-cluster | zoo | check: each sets itself up on a fresh machine (Python 3.11 or newer) and starts at once after that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test test-cluster zoo check cluster-node clean
.DELETE_ON_ERROR:

demo: $(VENV)/serve.stamp
	@$(BIN)/tandem demo

# Two at once: most tests wait for processes of their own. File by file, for files share what is slow to start.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -m "not alone" -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -q -m alone

# Real `ray up` on hosts made of namespaces: needs root, and Debian's packages, which root gets installed.
test-cluster: $(VENV)/dev.stamp
	@tests/cluster/packages.sh
	$(BIN)/python -m pytest -q tests/cluster

# Every causal language model of the installed transformers, tiny: 40 CPU minutes. Writes a table in docs/models.md.
zoo: $(VENV)/dev.stamp
	@$(BIN)/python tests/zoo/run_zoo.py

check: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/unit/test_stubs.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/torch.stamp: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Tandem needs Python 3.11 or newer; say which: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
# torch first and by itself: its pin decides between a CPU build and gigabytes of CUDA libraries.
	@$(PIP) torch
	@touch $@

# What the tests need covers what the demo needs, and a later `make demo` must not install anything again.
$(VENV)/serve.stamp: $(VENV)/torch.stamp
	@$(PIP) -e '.[serve]'
	@touch $@

# A node of a Ray cluster: the launcher files (cluster.yaml, deploy/cluster.onprem.yaml) call `make cluster-node` there.
cluster-node: $(VENV)/node.stamp

$(VENV)/node.stamp: $(VENV)/torch.stamp
	@$(PIP) -e '.[serve,ray]'
	@touch $(VENV)/serve.stamp $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/serve.stamp $@
