# Every target sets up .venv first, so a fresh clone needs Python and make, nothing else.
PYTHON ?= python3
# flags of the cells that run on top of the unmarked ones
FLAGS ?=
# the official archive, for cells marked realdata; absolute, because notebooks run inside nbs/, and not by
# $(abspath), which takes a path with a space for two
ARCHIVE := $(patsubst ~/%,$(HOME)/%,$(or $(TINY_IMAGENET),$(wildcard ../shared/data/tiny-imagenet-200.zip)))
override TINY_IMAGENET := $(if $(filter /%,$(firstword $(ARCHIVE))),,$(if $(ARCHIVE),$(CURDIR)/))$(ARCHIVE)
ifneq ($(TINY_IMAGENET),)
export TINY_IMAGENET
endif
BIN := .venv/bin
# an environment with the package alone, and one with all that develops and tests it; with uv, where that is installed
PACKAGE := .venv/.package
ENV := .venv/.installed
UV := $(shell command -v uv 2>/dev/null)
VENV := $(if $(UV),uv venv --quiet --seed --allow-existing --python $(PYTHON),$(PYTHON) -m venv)
INSTALL := $(if $(UV),uv pip install --python $(BIN)/python,$(BIN)/pip install --disable-pip-version-check)

# how often `make torture` kills in each place
KILLS ?= 9

.PHONY: help demo test test-all test-realdata test-cuda cuda-counts gpu browser colab docs torture lab export execute readme \
        stamp clean wheel release

help: ## print this list
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# touched last, so that an interrupted install is begun again; the log is kept, as it runs to hundreds of lines
define installed
@$(INSTALL) -e $(1) >.venv/pip.log 2>&1 || { tail -n 15 .venv/pip.log; exit 1; }
@touch $@
endef

$(PACKAGE): settings.ini setup.py
	@echo "setting up .venv (a minute or two the first time; log in .venv/pip.log)"
	@$(VENV) .venv
	$(call installed,.)

$(ENV): $(PACKAGE)
	@echo "adding what the checks and notebooks need to .venv"
	$(call installed,'.[dev]')

demo: $(PACKAGE) ## train a small ViT on a synthetic dataset; results in results/demo/
	@rm -rf results/demo
	@$(BIN)/vit_train demo --min_top1 0.5
	@echo "next: \`$(BIN)/vit_train sprint --out runs\` trains on the real images; \`make lab\` opens the notebooks, 00_quickstart first"

test: $(ENV) ## run all notebooks and every other check, in some minutes; FLAGS='slow' runs marked cells too
	@$(BIN)/python .ci/check.py --flags $(FLAGS)

test-all: $(ENV) ## the same with slow cells, and those on the real archive where it is at hand
	@$(BIN)/python .ci/check.py --flags slow $(if $(TINY_IMAGENET),realdata)

test-realdata: $(ENV) ## the cells on the real archive: TINY_IMAGENET=path/to/tiny-imagenet-200.zip
	@test -f "$(TINY_IMAGENET)" || { echo "set TINY_IMAGENET to the path of tiny-imagenet-200.zip"; exit 2; }
	@$(BIN)/python .ci/check.py --flags realdata

test-cuda: $(ENV) ## the cells that need a GPU
	@$(BIN)/python .ci/check.py --flags cuda

gpu: $(ENV) ## on a machine with a GPU: every check, then speed; results in runs/gpu
	@failed=0; $(BIN)/python .ci/gpu.py smoke --seconds 600 --limit 300 --out runs/gpu || failed=1; \
	$(BIN)/python .ci/gpu.py speed --seconds 600 --out runs/gpu && exit $$failed

cuda-counts: $(ENV) ## count kernels and waits a step on a CUDA device that is not there; WRITE=1 writes the table
	@OMP_NUM_THREADS=1 $(BIN)/python .ci/cuda_counts.py $(if $(WRITE),--write)

browser: $(ENV) ## what a user does, in a real browser (needs Chromium): vit_demo, a run stopped, Run all: NB='2_models/02_vit'
	@$(BIN)/python .ci/browser.py $(if $(NB),--notebooks $(NB))

colab: $(ENV) ## Run all in every notebook with Colab's versions of torch, numpy and IPython, nothing set
	@$(BIN)/python .ci/colab.py

docs: $(ENV) ## the site, in _docs/html, and a check of its links and images; where there is Chromium, of what is seen
	@rm -rf _docs && $(BIN)/python .ci/site_pages.py
	@$(BIN)/sphinx-build -q -W --keep-going -c .ci/site -d _docs/doctrees _proc _docs/html
	@$(BIN)/python .ci/site_check.py _docs/html

torture: $(ENV) ## kill runs at random moments, go on, compare with those left alone: KILLS=9 in each place
	@$(BIN)/python .ci/torture.py --kills $(KILLS)

lab: $(ENV) ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

export: $(ENV) ## write vit_tinyimagenet/ from the notebooks
	@$(BIN)/nbdev_export

execute: $(ENV) ## run notebooks and keep their outputs: NB='2_models/02_vit 3_training/01_optim', and FLAGS= for marked cells
	@$(BIN)/python .ci/execute.py $(NB) --flags $(FLAGS)

readme: $(ENV) ## write README.md and its figures from nbs/index.ipynb
	@$(BIN)/python .ci/readme.py

stamp: $(ENV) ## write Colab badges and cells, with the owner that settings.ini names
	@$(BIN)/python .ci/stamp.py

clean: $(ENV) ## strip the notebooks of what a run leaves besides its outputs
	@$(BIN)/nbdev_clean

wheel: $(ENV) ## build the wheel and use it as a user would, in an environment of its own; LOWEST=1: with the oldest versions allowed
	@rm -rf build dist *.egg-info
	@$(BIN)/python -m build --wheel >/dev/null
	@$(BIN)/python .ci/wheel_check.py dist $(if $(LOWEST),--lowest)

release: $(ENV) ## prepare VERSION=0.2.0: set it, date CHANGELOG, build, check what PyPI gets; the tag is yours to make
	@test -n "$(VERSION)" || { echo "which one? make release VERSION=0.2.0"; exit 2; }
	@$(BIN)/python .ci/release.py $(VERSION)
