# make demo | test | bench | docs | readme | hooks | clean: each alone turns a fresh clone into a working one.
# Another interpreter: make demo PYTHON=python3.12        Another place: make demo VENV=/path/to/venv

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
JOBS   ?= 2

# A machine without a GPU: make demo TORCH=cpu takes torch without CUDA. It is the name of a backend of uv: cpu, cu128, auto, ...
TORCH       ?=

# The notebooks, the tests and the demo need no network once the packages are installed.
export HF_HUB_OFFLINE = 1

.PHONY: help install demo test bench gpu tables docs readme export hooks clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train on the embedded data, score the maps, write demo/report.html"
	@echo "make test      notebooks clean and exported, README current, the paper's notebooks run, pytest"
	@echo "make bench     speed and memory beside the published way, into results/bench.json"
	@echo "make gpu       correctness, speed and real training on a GPU: make gpu GPU='--data voc:PATH --weights FILE'"
	@echo "make tables    the tables and figures of the paper on the embedded data, into results/ (hours)"
	@echo "make docs      the web site, in _docs/"
	@echo "make readme    README.md from nbs/index.ipynb"
	@echo "make export    clean the notebooks and write mctformer_nb/*.py from them"
	@echo "make hooks     git hooks that keep notebooks free of metadata and mergeable"
	@echo "make install   only create $(VENV) (with PYTHON=$(PYTHON))"
	@echo "               without a GPU: make install TORCH=cpu, likewise make demo and make test"
	@echo "make clean     remove what the targets above wrote; make distclean: $(VENV) too"

$(STAMP): settings.ini constraints.txt setup.py pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) is not installed. Install Python 3.10, 3.11 or 3.12, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: `"$(PYTHON)" -V 2>&1` is too old. Python 3.10 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "error: `"$(PYTHON)" -V 2>&1` cannot create virtual environments (no venv or ensurepip module). On Debian or Ubuntu: apt-get install python3-venv; or name another interpreter: make PYTHON=python3.11"; exit 1; }
	@"$(PY)" -m pip --version >/dev/null 2>&1 || { echo "Creating $(VENV) with `"$(PYTHON)" -V 2>&1`"; "$(PYTHON)" -m venv --clear "$(VENV)"; }
	@echo "Installing the packages into $(VENV): some minutes and GB the first time"
	@test -z "$(TORCH)" || { "$(PY)" -m pip install --disable-pip-version-check -c constraints.txt uv && "$(VENV)/bin/uv" pip install --python "$(PY)" --torch-backend="$(TORCH)" -c constraints.txt torch torchvision; }
	"$(PY)" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch "$@"

install: $(STAMP)

demo: $(STAMP)
	"$(VENV)/bin/mct_demo" --out demo

# Every part runs, even after one has failed, so that one run shows all there is to mend; pytest's count is the last line.
test: $(STAMP)
	@rc=0; "$(PY)" tools/check.py --jobs $(JOBS) || rc=1; OMP_NUM_THREADS=1 "$(PY)" -m pytest -n $(JOBS) --dist loadfile || rc=1; exit $$rc

# Another device or more threads: make bench BENCH='--device cuda' or BENCH='--threads 8'
bench: $(STAMP)
	"$(PY)" benchmarks/all.py $(BENCH)

# Needs no network and builds nothing: PYTHON is the interpreter that has torch
gpu:
	PYTHON="$(PYTHON)" bash experiments/gpu.sh $(GPU)

# Goes on where it stopped. One seed: make tables TABLES='--seeds 0'
tables: $(STAMP)
	"$(PY)" experiments/mini_maps.py $(TABLES)
	"$(PY)" experiments/reproduce.py $(TABLES)

docs: $(STAMP)
	"$(PY)" tools/docs.py

readme: $(STAMP)
	"$(PY)" tools/readme.py

export: $(STAMP)
	"$(VENV)/bin/nbdev_clean"
	"$(VENV)/bin/nbdev_export"

hooks: $(STAMP)
	PATH="$(abspath $(VENV))/bin:$$PATH" "$(VENV)/bin/nbdev_install_hooks"

clean:
	rm -rf build dist *.egg-info _docs _proc demo .pytest_cache nbs/nbdev.yml nbs/sidebar.yml
	find . -path "./$(VENV)" -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name .last_checked \) -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf "$(VENV)"
