# `make` alone lists what there is. Every target that needs the environment makes it first: .venv, by this file alone.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONNOUSERSITE := 1

PYTHON ?= python3
# where pip shall take torch from, e.g. `make install TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"` (small, no CUDA)
TORCH_FLAGS ?=
PY := .venv/bin/python
# The stamp's name is a hash of what is required and of where the checkout lies: installed again only when one of them changes.
STAMP := .venv/.installed-$(shell { cat settings.ini setup.py constraints.txt; pwd; } | cksum | tr -d ' ')
# notebooks in parallel, one thread each, with a limit in seconds (nbdev has none)
NBTEST = OMP_NUM_THREADS=1 $(if $(shell command -v timeout),timeout --kill-after=10 $(1)) .venv/bin/nbdev_test --timing
# .venv/bin first, so that tests and notebooks may call `mri_gen` and `papermill` by name
# JOBS=2: two files of tests at a time; two tests then were seen to disturb each other, so it is not the default.
JOBS ?= 0
PYTEST = PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m pytest -q --timeout=900 -n $(JOBS) --dist loadfile
# "hash size name" of everything that is generated, or cleaned
GENERATED = find . -name .venv -prune -o -type f \( -path './mri_gen/*.py' -o -path './nbs/*.ipynb' -o -path './kaggle/*' -o -path ./README.md \) -not -path '*/.*/*' -print0 | xargs -0 cksum | sort

.PHONY: help install demo test check lab docs prepare readme generated reference pictures fresh constraints clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## only the environment: .venv with the versions of constraints.txt

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or pass PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) -V) is too old; pass PYTHON=python3.11 or newer" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { echo "make: no virtual environment; install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (a few minutes the first time)"
	@rm -f .venv/.installed-*
	@$(PY) -m pip install -qq -c constraints.txt setuptools wheel
	@# torch first and alone: nothing that comes later may choose another build of it
	@$(PY) -m pip install -qq $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	@$(PY) -m pip install -qq -c constraints.txt --no-build-isolation -e '.[dev,cluster,docs]'
	@touch $@

demo: $(STAMP)  ## the whole tour on simulated subjects: look at the report page it names
	@.venv/bin/mri_gen demo $(ARGS)

# the library only: experiments (5x) and reports (9x) are run by papermill, from pytest
test: generated  ## everything: generated files, library notebooks, pytest with the experiments
	$(call NBTEST,1800) --skip_file_re '^([_.]|[59][0-9]_)'
	$(PYTEST) tests

check: generated  ## the quick subset, under 3 minutes: generated files, notebooks 00 to 06, quick tests
	$(call NBTEST,150) --file_re '^0[0-6]_'
	$(PYTEST) -m "not slow" tests

# .jupyter: the start notebook; nothing is asked of the internet. Jupyter does not start as root unless told to; in a container there is nobody else.
lab: $(STAMP)  ## JupyterLab on the start notebook: ten minutes with everything
	@JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" .venv/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

docs: $(STAMP)  ## the documentation site: _docs/site/index.html, every link tried
	@$(PY) -m mri_gen.docs_site

prepare: $(STAMP)  ## after editing a notebook: clean it, export the modules, rebuild the Kaggle notebooks and the README
	@.venv/bin/nbdev_clean
	@# widgets without their kernel are an error message, and their state is megabytes, which nbdev keeps; the picture beside them stays
	@$(PY) -c "from pathlib import Path; from execnb.nbio import read_nb, write_nb; k = 'application/vnd.jupyter.widget-view+json'; [write_nb(n, p) for p in Path('nbs').glob('31_*.ipynb') for n in [read_nb(p)] if bool(n.metadata.pop('widgets', None)) | bool([o.data.pop(k) for c in n.cells for o in c.get('outputs', []) if k in o.get('data', {})])]"
	@.venv/bin/nbdev_export
	@.venv/bin/mri_gen kaggle --all >/dev/null
	@$(MAKE) -s --no-print-directory readme

# nbs/index.ipynb is run, so that its tables are those of artifacts/; links are relative to nbs/ there and to the top in the README
readme: $(STAMP)
	@cd nbs && OMP_NUM_THREADS=1 ../.venv/bin/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace index.ipynb 2> >(grep -v IPKernelApp >&2)
	@.venv/bin/nbdev_clean --fname nbs/index.ipynb
	@# the version of Python that ran it is nobody's change
	@$(PY) -c "from execnb.nbio import read_nb, write_nb; p = 'nbs/index.ipynb'; n = read_nb(p); n.metadata['language_info'] = {'name': 'python'}; write_nb(n, p)"
	@.venv/bin/jupyter nbconvert --log-level ERROR --to markdown --no-input --stdout nbs/index.ipynb \
	  | sed -E 's#\]\(\.\./#](#g; s#\]\(([0-9a-z_]+\.ipynb)#](nbs/\1#g' | cat -s > .venv/README.md
	@cmp -s .venv/README.md README.md || cp .venv/README.md README.md

# what is generated must not change when it is generated again; names the files that did
generated: $(STAMP)
	@before=$$($(GENERATED)); $(MAKE) -s --no-print-directory prepare; after=$$($(GENERATED)); \
	stale=$$(comm -3 <(echo "$$before") <(echo "$$after") | awk '{print $$3}' | sort -u); \
	if [ -n "$$stale" ]; then printf 'stale, and now regenerated: look at the change and commit it\n%s\n' "$$stale" >&2; exit 1; fi
	@echo "generated files are up to date"

reference: $(STAMP)  ## renew tests/reference/*.json ON PURPOSE, after a change that is meant to move a result
	$(PYTEST) tests/test_experiments.py --renew
	@git --no-pager diff --stat -- tests/reference || true

pictures: $(STAMP)  ## the explorers' screenshots, nbs/images/explore_*.webp, anew (needs Chromium)
	$(PYTEST) tests/test_browser.py --renew -s

fresh: ## the promise of the README: a fresh clone, both commands twice, the tree clean; writes artifacts/timings.json
	@.ci/fresh

constraints: $(STAMP)  ## write constraints.txt anew from .venv
	@{ grep '^#' constraints.txt; $(PY) -m pip freeze --all --exclude-editable | grep -v -i -E '^(#|pip==|wheel==|mri[_-]gen)' \
	  | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' | LC_ALL=C sort -f; } > .venv/constraints && mv .venv/constraints constraints.txt

clean:  ## remove the environment, caches and the demo's folder (never data/ or artifacts/)
	rm -rf .venv demo build dist _proc _docs mri_gen.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
