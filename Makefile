# Everything that a fresh machine needs is installed here. `make help` lists the commands.
VENV     ?= .venv
PYTHON   ?= python3
SITE     ?= build/site
RUNS     ?= $(SITE)-runs
NOTEBOOK ?=
MODEL    ?=
WEB      ?=

BIN  := $(VENV)/bin
DONE := $(VENV)/.installed
MORE := $(VENV)/.more
ASK  := $(VENV)/.web

# what the simulated device runs in every test; `pytest tests --device far` runs all
FAR := $(addprefix tests/,attention $(addprefix core/test_,interventions.py losses.py text.py fast_forward.py own_writing.py) \
	$(addprefix steering/test_,apply.py fit.py training.py) \
	$(addprefix saes/test_,features.py clamping.py reading.py) \
	$(addprefix decisions/test_,cycle.py locate.py))

.PHONY: help run site lab test lint bench assets saes clean workshop reproduce kit compat seeds
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'
	@echo "  make site WEB=1             also a page that runs the model in the browser; then: $(BIN)/glassbox serve $(SITE)"
	@echo "  make run MODEL=gpt2 NOTEBOOK=01   another model (a name or a folder), one notebook"

# The lock is the full resolved set; the package itself is installed without dependencies on top of it.
$(DONE): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Glassbox needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python && test "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): about five minutes, once, without further words"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

assets: $(DONE)  ## fetch and prepare the embedded model (93 MB, once)
	@$(BIN)/glassbox assets --fetch > /dev/null

# what the site is built with; nothing else needs it
$(MORE): requirements-more.lock $(DONE)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --progress-bar on -r requirements-more.lock
	@touch $@

# what the page one can question is exported with
$(ASK): requirements-web.lock $(DONE)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --progress-bar on -r requirements-web.lock
	@touch $@

run: assets $(MORE)  ## run the notebooks on the model and write the site of what they found to build/site
	@$(BIN)/glassbox run $(NOTEBOOK) $(if $(MODEL),--model "$(MODEL)") --site $(RUNS); code=$$?; test $$code -ne 2 || exit 2; \
	test ! -e $(RUNS)/runs.json || $(BIN)/glassbox site --runs $(RUNS) --out $(SITE) || exit; exit $$code

site: assets $(MORE) $(if $(WEB),$(ASK))  ## the same site of the shipped outputs, with pages of features (WEB=1: and the model to ask)
	@echo "Building the site: about four minutes, without further words"
	$(BIN)/glassbox site --out $(SITE) --features 24 $(if $(WEB),--ask)

lab: assets  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks --KernelManager.transport_encryption=auto

lint: $(DONE)  ## style, types, and the order of the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check glassbox_utils tests notebooks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: assets lint $(MORE) $(ASK)  ## unit tests, every notebook as a test, browser tests
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -m "not ranks and not shapes and not long and not kit and not browser" -n 2 --dist loadfile
	$(BIN)/pytest tests/lab tests/decisions -m "browser and not long" -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/pytest $(FAR) -n 2 --dist loadfile --device far -m "not slow and not ranks and not long" -k "not gpt2 and not gemma3"
	OMP_NUM_THREADS=1 $(BIN)/pytest -p no:cacheprovider -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout 900 \
		--nbval-sanitize-with tests/nbval_sanitize.cfg notebooks

workshop: assets  ## student copies, the instructor's course folder and slides, in build/workshop
	$(BIN)/glassbox workshop $(NOTEBOOK)

reproduce: assets  ## compute again what README, cards and results page state (QUICK=1: a random tenth)
	$(BIN)/glassbox reproduce $(if $(QUICK),--quick)

kit: assets  ## one archive for machines without a network, in build/kit (CHECK=1 installs and runs it there)
	$(BIN)/glassbox kit --site $(SITE) $(if $(CHECK),--check)

compat: assets  ## install and test on other Pythons (PYTHONS="python3.11 python3.13"), lock and newest; hours
	$(BIN)/glassbox compat --python $(or $(PYTHONS),$(PYTHON))

seeds: assets  ## the notebooks with SEED 1 to 4, and which findings keep their verdict; two hours, resumable
	$(BIN)/glassbox seeds $(NOTEBOOK)

# Each line goes on where it was stopped; the second width shares the harvest of the first. docs/saes.md says how long.
saes: assets  ## the model writes text, and the large SAEs are trained on it and evaluated (a night on two cores)
	$(BIN)/glassbox write-text smollm2
	for name in long-8192-l14 long-16384-l14 long-8192-l19; do $(BIN)/glassbox train-sae data/saes/$$name || exit 1; done

bench: assets  ## measure speed side by side with transformers, TransformerLens and sae-lens
	$(BIN)/pytest tests/benchmarks -q -s --override-ini python_files='bench_*.py'

clean:  ## remove the virtual environment and the built pages (not the cache of downloads)
	rm -rf $(VENV) build *.egg-info
