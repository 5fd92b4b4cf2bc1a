# Every target sets up what it needs in .venv first; a second call starts at once.
#
#   make PYTHON=python3.12 …      another Python (3.11 or newer)
#   make train ARGS="--help"      more words for the command
#   make notebooks NB=notebooks/02_masking.ipynb

# The first Python that is new enough; python3 if none is, so that the message below names it.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$p && break; done),python3)

VENV := .venv/bin/python
READY := .venv/.ready
DOCS_READY := .venv/.docs
ARGS ?=
NB ?= $(wildcard notebooks/[0-9]*.ipynb)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# Asking for a GPU must not start CUDA: a later fork (several processes from one notebook) would die.
export PYTORCH_NVML_BASED_CUDA_CHECK := 1

# The stamp holds the folder it was made for: a moved, copied or broken .venv is made anew.
ifneq ($(shell $(VENV) -c "" 2>/dev/null && cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

.PHONY: help setup train lab test notebooks bench docs lint wheel-check format clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## only set up: .venv with mmkit, JupyterLab and the test tools

# One set-up at a time (the lock). `.installing` stays behind when a set-up is interrupted; the next
# one then starts from an empty folder, because pip cannot tell a half-copied package from a whole
# one. When pip itself gives up (no network, say), what was there before is kept.
$(READY): pyproject.toml
	@exec 9<Makefile; ! command -v flock >/dev/null || flock 9 || true; \
	if [ $(READY) -nt pyproject.toml ] && $(VENV) -c "" 2>/dev/null \
	    && [ "$$(cat $(READY))" = "$(CURDIR)" ]; then exit 0; fi; \
	$(PYTHON) -c "$(NEW_ENOUGH)" 2>/dev/null || { \
	    echo "mmkit needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Install one, or name it: make PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module. On Debian or Ubuntu: apt-get install python3-venv" >&2; \
	    exit 1; }; \
	if [ -e .venv/.installing ] || { [ -e .venv ] && ! $(VENV) -m pip --version >/dev/null 2>&1; } \
	    || { [ -e $(READY) ] && [ "$$(cat $(READY))" != "$(CURDIR)" ]; }; then \
	    echo "The last set-up was not finished, or was made for another folder: starting afresh."; \
	    rm -rf .venv; \
	fi; \
	echo "Setting up .venv (once; a few minutes, most of it the download of PyTorch) ..."; \
	mkdir -p .venv && touch .venv/.installing && rm -f $(READY) \
	&& { [ -x $(VENV) ] || $(PYTHON) -m venv .venv; } \
	&& { $(VENV) -m pip install --quiet -e ".[notebooks,test]" \
	    || { rm -f .venv/.installing; exit 1; }; } \
	&& rm .venv/.installing && echo "$(CURDIR)" > $(READY)

train: $(READY)  ## train the small model on the built-in images
	$(VENV) -m mmkit train $(ARGS)

# PATH: so that `!tensorboard` in a cell is the one in .venv. Jupyter wants root to say so.
lab: $(READY)  ## JupyterLab, opened on notebooks/
	@exec env PATH="$(CURDIR)/.venv/bin:$$PATH" TENSORBOARD_BINARY="$(CURDIR)/.venv/bin/tensorboard" \
	$(VENV) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks \
	    $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(ARGS)

test: $(READY)  ## all tests, and every notebook in its fast mode
	@$(VENV) -m pytest --nbmake --nbmake-timeout=600 tests $(wildcard notebooks) $(ARGS)

notebooks: $(READY)  ## run the notebooks in full, top to bottom, and write their outputs
	$(VENV) -m tests.execute_notebooks $(NB)

bench: $(READY)  ## a training step beside open_clip's and transformers' (leave the machine alone)
	$(VENV) -m pip install --quiet -e ".[bench]"
	$(VENV) -m tests.benchmarks.step_speed $(ARGS)

$(DOCS_READY): $(READY)
	$(VENV) -m pip install --quiet -e ".[docs]"
	touch $(DOCS_READY)

docs: $(DOCS_READY)  ## the book, docs/_build/html/index.html; built without a network, warnings are errors
	$(VENV) -m sphinx --quiet --fail-on-warning --keep-going -c docs -d docs/_build/doctrees . docs/_build/html

lint: $(READY)  ## style and types of code, style of notebooks
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy
	.venv/bin/lint-imports --no-cache
	$(VENV) -m tests.code_size
	$(VENV) -m tests.notebook_hygiene $(NB)

wheel-check: $(READY)  ## build a wheel, and use it in an empty environment outside this folder
	$(VENV) -m tests.wheel_check

format: $(READY)  ## put code and notebooks into that style
	$(VENV) -m ruff check --fix-only .
	$(VENV) -m ruff format .

clean:  ## remove caches and builds; keeps .venv and runs/
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mmkit tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
