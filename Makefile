# make run    installs into .venv, runs the stages in order on preset tiny, prints one table
# make test   the same set-up, then the whole suite
# make notebooks   the same set-up, then executes notebooks/src and writes the notebooks
# make pages  renders what is generated from rows and comments: tables, docs/differs.md, docs/open-questions.md, docs/pipeline.png
# make course exports the students' repository into out/course, runs their first command there, and solves every assignment in it
# make run PYTHON=python3                  use an interpreter that already has torch, and make no .venv
# make run TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"     choose the torch wheel (here: the CPU build)
TORCH       ?= torch==2.13.0
CONSTRAINTS ?= constraints-cpu.txt

ifdef PYTHON
PY    := $(PYTHON)
SETUP :=
else
PY    := .venv/bin/python
SETUP := .venv/.installed
endif

.PHONY: run test notebooks course check pages clean
run: $(SETUP)
	@mkdir -p out && rm -f out/results.jsonl
	$(PY) 01_nvfp4.py
	$(PY) 02_mamba.py
	$(PY) 03_latentmoe.py
	$(PY) 04_model.py
	$(PY) experiments/plot_model.py
	$(PY) 05_pretrain.py --fresh
	$(PY) experiments/plot_run.py
	$(PY) 06_sft.py --fresh
	$(PY) 07_rlvr_mopd.py --fresh
	$(PY) 08_infer.py
	@$(PY) experiments/table.py summary

test: $(SETUP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

notebooks: $(SETUP)
	OMP_NUM_THREADS=1 $(PY) notebooks/build.py $(NOTEBOOKS)

course: $(SETUP)
	rm -rf out/course
	OMP_NUM_THREADS=1 $(PY) assignments/make.py --export out/course --prove

check: $(SETUP)
	$(PY) -m ruff check .

pages: $(SETUP)
	$(PY) experiments/table.py readme
	$(PY) experiments/pages.py
	$(PY) experiments/plot_pipeline.py

clean:
	rm -rf out .venv

.venv/.installed: pyproject.toml $(CONSTRAINTS)
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) $(TORCH)
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) '.[test]'
	@rm -rf build *.egg-info
	@touch $@
