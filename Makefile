# The commands that people type. `make quick` before every commit; CI is .ci/run.
.PHONY: quick test docs

FAST = tests/test_masking.py tests/test_files.py tests/test_machine.py tests/test_docs.py tests/adapter tests/calibration \
       tests/decoder tests/sparsifiers tests/weights/test_fold.py tests/layers tests/cli/test_progress.py

quick:
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadscope -m "not slow" $(FAST)

test:
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 30

docs:
	mkdocs build --strict
