# make run    virtual environment, install, then naive finetuning against EWC in both frameworks, on real images
# make test   the same install, then ruff, mypy and pytest
# make docs   the documentation site in build/docs, which any web server can serve
# make axe    axe-core on every page of build/docs, in Chromium; needs npm
# make bench  training steps per second, compared with hand-written loops; make bench ARGS=--help lists the options
# make slow   the tests that take minutes each
# make tables the pages of published tables and the results of README.md, from the measured values in docs/tables/
# make adapters  tests with streams of Avalanche and Continuum, in a separate environment
# make launchers  sweeps with Hydra's launchers joblib, submitit and ray, in a separate environment
# make peers  training steps per second beside Avalanche's, in a separate environment; writes docs/trust/
# make mutants  mutation testing of the methods, in a separate environment; writes docs/trust/mutants.json
# make clu    tests with clu's writers, which need TensorFlow, in a separate environment
# make clean  remove what these commands made; runs/ stays
#
# Needs Python >= 3.11 with venv. To use another interpreter: make PYTHON=python3.12 run

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FILES := $(VENV)/.package-files

.PHONY: run test docs axe bench slow tables adapters launchers peers mutants clu install clean FORCE
.DELETE_ON_ERROR:

run: install
	$(BIN)/sequel demo

test: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

# Tutorials call the command `sequel`.
docs: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	$(BIN)/python -m tests.site build/docs

axe: install
	npm install --prefix build/axe --no-fund --no-audit axe-core@4
	$(BIN)/python -m tests.axe build/docs build/axe/node_modules/axe-core/axe.min.js

bench: install
	$(BIN)/python -m tests.speed $(ARGS)

slow: install
	$(BIN)/pytest -m slow

tables: install
	$(BIN)/python -m tests.measured

# Continuum needs six, but does not declare it.
adapters:
	$(PYTHON) -m venv $(VENV)-adapters
	$(VENV)-adapters/bin/pip install --quiet --constraint constraints.txt --config-settings editable_mode=strict \
		--editable '.[all,dev]' avalanche-lib==0.6.0 continuum==1.2.7 six
	$(VENV)-adapters/bin/pytest -m slow tests/adapters

# Ray's launcher needs cloudpickle < 3, which joblib 1.6 does not accept, and boto3 needs python-dateutil < 3.
launchers:
	$(PYTHON) -m venv $(VENV)-launchers
	grep -vE '^(cloudpickle|joblib|python-dateutil)==' constraints.txt > $(VENV)-launchers/constraints.txt
	$(VENV)-launchers/bin/pip install --quiet --constraint $(VENV)-launchers/constraints.txt \
		--config-settings editable_mode=strict --editable '.[all,dev,joblib,submitit,ray]' \
		'cloudpickle<3' 'joblib<1.6' boto3==1.44.8 ray==2.60.0
	$(VENV)-launchers/bin/pytest -m slow tests/launchers

# Avalanche installs a package `tests`, which would hide the folder.
peers:
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip install --quiet --constraint constraints.txt --config-settings editable_mode=strict \
		--editable '.[all,dev]' avalanche-lib==0.6.0
	rm -rf $(VENV)-peers/lib/python*/site-packages/tests
	$(VENV)-peers/bin/python -m tests.speed.peers $(ARGS)

# ARGS="--count 6 ewc si" are other numbers of mutants and methods.
mutants:
	$(PYTHON) -m venv $(VENV)-mutants
	$(VENV)-mutants/bin/pip install --quiet --constraint constraints.txt --config-settings editable_mode=strict \
		--editable '.[all,dev]' cosmic-ray==8.7.0
	$(VENV)-mutants/bin/python -m tests.mutants $(ARGS)

clu:
	$(PYTHON) -m venv $(VENV)-clu
	$(VENV)-clu/bin/pip install --quiet --constraint constraints.txt --config-settings editable_mode=strict \
		--editable '.[flax,dev]' tensorflow-cpu==2.21.0
	$(VENV)-clu/bin/pytest -m slow tests/adapters/test_clu.py

install: $(STAMP)

# A strict editable install links each file, so it is repeated when a file is added or removed. $(FILES) is rewritten
# only if the list of files has changed.
$(STAMP): pyproject.toml constraints.txt $(FILES)
	@echo "Installing into $(VENV); the first time takes minutes"
	$(BIN)/pip install --constraint constraints.txt --config-settings editable_mode=strict --editable '.[all,dev,docs]'
	touch $@

$(FILES): FORCE | $(BIN)/python
	@find hydra_plugins sequel_core sequel_lightning sequel_flax benchmarks configs -type f \
		\( -name '*.py' -o -name '*.yaml' -o -name '*.html' -o -name '*.css' -o -name py.typed \) | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

FORCE:

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"SequeL needs Python >= 3.11, got {sys.version}")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VENV)-adapters $(VENV)-launchers $(VENV)-peers $(VENV)-mutants $(VENV)-clu build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find hydra_plugins sequel_core sequel_lightning sequel_flax benchmarks configs tests -name __pycache__ -type d -prune -exec rm -rf {} +
