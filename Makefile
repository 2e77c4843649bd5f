# The tiers of CONTRIBUTING.md, in the environment that is active.
export OMP_NUM_THREADS := 1

.PHONY: lint test slow docs
lint:
	ruff check .
	ruff format --check .
	mypy
	pytest -q tests/test_rooms.py tests/test_docs.py -k "not examples_run"
test:
	pytest -n 2 --dist loadfile
slow:
	pytest -n 2 --dist loadfile -m "slow and not long"
docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
