# What there is to do; `make` alone lists it. Everything is installed once, into .venv.

.DEFAULT_GOAL := help
.PHONY: help run test lab lint browser clean
# Nothing here gains from running at the same time, and two installations would collide.
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Any of these will do, the first that is new enough; make PYTHON=/path/to/python names another.
PYTHON = $(eval PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done))$(PYTHON)

# Waiting threads that spin slow everything down as soon as another program wants a core.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

STRIP := $(BIN)/nbstripout --verify --keep-count \
	--extra-keys "metadata.papermill cell.metadata.papermill metadata.widgets"
# JupyterLab in .venv shows Markdown as a page, so that the links of the index can be followed.
LAB := $(VENV)/share/jupyter/lab/settings
RENDERED := {"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}}}
TESTING := HF_HUB_OFFLINE=1 MPLBACKEND=agg OMP_NUM_THREADS=2
PYTEST := $(TESTING) $(BIN)/python -m pytest -q -p no:cacheprovider

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile

run: $(READY)  ## run the six notebooks on the phantom, report in runs/phantom/report/index.html
	@$(BIN)/prism-nb run params/phantom.yaml
	@mkdir -p figures && cp runs/phantom/figures/*.png figures/

test: lint browser  ## check style, run the notebooks against their outputs, run all tests
	@$(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout=120 -x -p no:randomly notebooks
	@$(PYTEST) -n 2 --dist loadfile tests

lab: $(READY)  ## open the index of the notebooks in JupyterLab
	@mkdir -p $(LAB) && echo '$(RENDERED)' > $(LAB)/overrides.json
	@$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/README.md \
		$(if $(filter 0,$(shell id -u)),--allow-root)

lint: $(READY)  ## check style, and that notebooks hold no outputs but the checked ones
	@$(BIN)/ruff check --quiet && $(BIN)/ruff format --check --quiet
	@$(STRIP) notebooks/*.ipynb

# For the test in JupyterLab: a browser that is there, else Debian's for root, else playwright's own.
browser: $(READY)
	@for name in chromium chromium-browser google-chrome; do \
		command -v $$name >/dev/null && exit 0; done; \
	test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium \
		>/dev/null && exit 0; \
	$(BIN)/playwright install chromium || \
		echo "no browser could be installed: the test in JupyterLab needs one" >&2

clean:  ## remove caches and build leftovers; runs/ and .venv stay
	@rm -rf build dist *.egg-info .ruff_cache .pytest_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -path ./runs -prune -o \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

# The mark is set last. Without it .venv is made anew, so that half an installation never counts.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found;" \
		"install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -e $(READY) || $(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) cannot make a" \
		"virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@rm -f $(READY)
	@echo "Installing into $(VENV), once: about 6 GB, most of it torch; this takes some minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
		-c constraints.txt -e '.[test]'
	@touch $(READY)
