# `make help` lists the commands. Each of them first makes .venv, if it is missing or out of date.

LAB_ARGS ?=
PARAMS ?=

RUN = .venv/bin/python
# One thread for each worker: they would otherwise fight over the cores.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 4
LOG = build/setup.log
# JupyterLab's plug-in that asks at the first start whether to show news, and looks for updates.
NEWS = @jupyterlab/apputils-extension:announcements

# The first of these that runs and has a supported version (a pyenv shim may be there and not run).
SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON = $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$python && break; done)

.PHONY: help setup lab lab-reset check test course notebooks lint bench mutations clean

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1#\2/p' Makefile | \
		awk -F'#' '{printf "%-16s%s\n", $$1, $$2}'

setup: .venv/installed  ## make .venv and install the course into it

# The stamp names the folder it was made in: after a move, or without its Python, start afresh.
ifneq ($(shell test -x $(RUN) && cat .venv/installed 2>/dev/null),$(CURDIR))
.venv/installed: afresh
.PHONY: afresh
afresh:
	@mkdir -p build
	@python='$(PYTHON)'; $${python:-false} -c '$(SUPPORTED)' >/dev/null 2>&1 || { \
		echo "No Python 3.11 to 3.13 found ($${python:-python3} -V says:" \
			"$$($${python:-python3} -V 2>&1 | head -n 1)). Install one, or name it:" \
			"make setup PYTHON=/path/to/python3.12"; exit 1; }; \
	$$python -m venv --clear .venv >$(LOG) 2>&1 || { \
		echo "$$python could not make .venv (see $(LOG)). On Debian or Ubuntu, run" \
			"apt install python3-venv and try again."; exit 1; }
endif

# No stamp stays behind while pip is at work, so that an interrupted install is begun anew.
.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv, which can take some minutes (pip's output: $(LOG))"
	@mkdir -p build; rm -f $@
	@$(RUN) -m pip install -c constraints.txt -e '.[course,test]' >$(LOG) 2>&1 || { \
		if grep -qE 'connection broken|ConnectionError|ConnectTimeout|name resolution' $(LOG); \
		then echo "pip could not reach its package index (see $(LOG)). Check the network, or" \
			"pip's proxy setting, and try again."; \
		else echo "pip failed: $$(grep -m 1 -o 'ERROR: .*' $(LOG)) (see $(LOG))." \
			"To begin with nothing, run make clean first."; fi; exit 1; }
	@$(RUN) -m jupyter labextension disable $(NEWS) >>$(LOG) 2>&1
	@echo '$(CURDIR)' >$@

lab: setup  ## open your copy of the course, lab/, in JupyterLab (LAB_ARGS="--port 8899")
	$(RUN) scripts/course.py lab
	$(RUN) -m jupyterlab --LabApp.default_url=/lab/tree/lab/00_start_here.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

lab-reset: setup  ## move your copy aside, and make a fresh one
	$(RUN) scripts/course.py lab --reset

check: lint  ## check style and types, and run the unit tests, in two minutes
	$(PYTEST) tests --ignore=tests/parity --ignore=tests/scripts --ignore-glob='tests/test_notebook*'

test: setup  ## run every test, and every notebook under nbval and papermill
	$(PYTEST)

course: setup  ## run all notebooks into build/ (PARAMS="-p device cpu -p seed 1")
	$(RUN) scripts/course.py run $(PARAMS)

notebooks: setup  ## run all notebooks in place, and store their outputs
	$(RUN) scripts/course.py store

lint: setup  ## check style (notebooks too) and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy moe_ref

bench: setup  ## measure this code beside its peers
	@for script in benchmarks/*.py; do echo "$(RUN) $$script"; $(RUN) $$script || exit 1; done

mutations: setup  ## break the library in known ways: the notebook that teaches it must notice
	$(RUN) scripts/mutations.py

clean:  ## remove all that these commands made, .venv included, but for your copies in lab/
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
