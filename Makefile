# make help first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
N      ?= 2
SECONDS ?= 180
TORCH  := torch==2.13.0
PIP    := $(BIN)/pip install --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help demo test prove mutants lint lines lessons student grade lab speedrun bench matrix figures test-gpu lock clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## install, train a small code model on two ranks for three minutes, plot, complete, chat (SECONDS=180)
	$(BIN)/python scripts/demo.py --seconds $(SECONDS) $(if $(OUT),--out $(OUT)) $(if $(HEADERS),--headers $(HEADERS))

SHORT  := $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not timed and not prove and not gpu"
TIMED  := $(BIN)/python -m pytest -q -m timed $$(grep -rl --include=*.py mark.timed tests)
NARROW := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2

test: $(VENV)/installed  ## the CPU suite, 8 minutes on 2 cores
	$(BIN)/ruff check .
	$(BIN)/python scripts/lines.py
	$(SHORT)
	$(TIMED)

prove: $(VENV)/installed  ## the long proofs: 8 ranks, random faults, all lessons at full size; the suite on narrower CPUs
	$(BIN)/python -m pytest -q -m prove
	$(NARROW) CFLAGS=-march=haswell $(SHORT) --allowance
	$(NARROW) CFLAGS=-march=haswell $(TIMED)
	$(NARROW) CFLAGS=-march=x86-64 $(SHORT) tests/serve

mutants: $(VENV)/installed  ## show that every check rejects its known-wrong variants
	$(BIN)/python -m nanoinfra.lab.mutants

lint: $(VENV)/installed  ## ruff
	$(BIN)/ruff check .

lines: $(VENV)/installed  ## lines a module, into README too; fails past 300
	$(BIN)/python scripts/lines.py --table --readme

lessons: $(VENV)/installed  ## build the notebooks and open JupyterLab
	$(BIN)/python -m nanoinfra.lab.build_notebooks lessons
	$(BIN)/jupyter lab --notebook-dir lessons/build

student: $(VENV)/installed  ## build the student edition and nbgrader's tree: solutions cleared, hidden tests dropped
	$(BIN)/python -m nanoinfra.lab.build_notebooks student

grade: $(VENV)/installed  ## grade work/LNN.py: make grade L=02
	$(BIN)/python -m nanoinfra.lab.grading.grade_lesson $(L)

lab: $(VENV)/installed  ## a lab on N ranks: make lab L=08 N=4 (and BREAK=, MODEL=: its handout.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m nanoinfra.lab.run_lab $(L) --nproc $(N) $(LAB)
lab: LAB = $(if $(BREAK),--break $(BREAK)) $(if $(MODEL),--model $(MODEL))

speedrun: $(VENV)/installed  ## 60 s of training against the frozen loop's 120 s, three pairs
	$(BIN)/python scripts/bench/speedrun.py

bench: $(VENV)/installed  ## against torch DDP and a plain torch loop, fifteen pairs each
	$(BIN)/python scripts/bench/train.py

matrix: $(VENV)/installed  ## every technique with every other: gradients against one rank, bytes by axis
	OMP_NUM_THREADS=1 $(BIN)/python scripts/matrix.py

figures: $(VENV)/installed  ## draw README's picture again
	$(BIN)/python scripts/figures.py

test-gpu: $(VENV)/installed  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

lock:  ## resolve requirements.lock again (scripts/lock.py)
	$(PYTHON) scripts/lock.py $(TORCH) $(LOCK)

clean:  ## remove what make made; work/ is yours and stays
	rm -rf $(VENV) runs lessons/build build *.egg-info

# requirements.lock has all but torch, whose file differs by platform, and the CUDA libraries its build may want.
$(VENV)/installed: pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked set into $(VENV) ..."
	$(PIP) --no-deps --require-hashes -r requirements.lock
	$(PIP) $(TORCH)
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@
