# One line for each thing a person does here. CI calls the same scripts.
.POSIX:
.PHONY: help setup check histories test run demo bench bench-large docs image clean
.DEFAULT_GOAL := help

PY = .venv/bin/python
RUN = .run

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: ## make .venv ready (cheap when nothing changed)
	@script/setup --test

check: setup ## format, lint, types, import rules, quick tests: under a minute on two cores
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports
	@$(PY) -m compileall -q agentqd
	@free=$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $$4 }'); memory=; \
	if [ "$${free:-0}" -gt 1048576 ] && [ -w /dev/shm ]; then memory=/dev/shm; fi; \
	base=$$(mktemp -d "$${memory:-/tmp}/aq-XXXXXX") && chmod 711 "$$base" && \
	AGENTQD_QUICK=1 PYTHONDONTWRITEBYTECODE= TMPDIR="$$base" $(PY) -m pytest -q -n 2 --dist loadgroup --basetemp="$$base/t" \
	  -o tmp_path_retention_policy=failed \
	  -m "not real and not slow and not sshd and not root and not systemd and not image" && rm -rf "$$base"

histories: ## scheduling against its plain rules, 10,000 random histories: about a minute
	@script/setup --test
	@AGENTQD_HISTORIES=10000 PYTHONDONTWRITEBYTECODE=1 $(PY) -m pytest -q -n 2 tests/loops/test_scheduling_model.py

test: ## everything (script/test): as root it also boots systemd and builds the image
	@script/test

run: ## a daemon in the foreground, its state in .run/; Ctrl-C stops it
	@script/setup
	@mkdir -p $(RUN) && echo '*' > $(RUN)/.gitignore
	@echo 'In another terminal:'
	@echo "  echo '{\"task\":\"hello\",\"prompt\":\"echo hello from \$$AGENTQ_TASK_ID\"}' >> '$(CURDIR)/$(RUN)/state/queue/tasks.jsonl'"
	@echo "  '$(CURDIR)/.venv/bin/agentqctl' --socket '$(CURDIR)/$(RUN)/sockets/agentqd.sock' status"
	@echo
	@exec .venv/bin/agentqd run --stop-workers --state-dir $(RUN)/state --runtime-dir $(RUN)/sockets

demo: ## the mission in 30 seconds, for real; leaves nothing behind
	@script/demo

bench: ## speed, as ratios against floors measured in the same run
	@script/setup --test
	@$(PY) -m benchmarks

bench-large: ## the same with 1,000,000 waiting tasks
	@script/setup --test
	@$(PY) -m benchmarks --large

docs: ## dead links and anchors in README.md and docs/
	@script/setup
	@$(PY) script/check-docs

image: ## build the container image (podman, docker or buildah; BASE=... for another base)
	@for tool in podman docker buildah; do \
	  if command -v $$tool >/dev/null 2>&1; then \
	    case $$tool in docker) format= ;; *) format='--format docker' ;; esac; \
	    exec $$tool build $$format -t agentqd $${BASE:+--build-arg "BASE=$$BASE"} . ; \
	  fi; done; \
	echo 'make image: install podman, docker or buildah first' >&2; exit 1

clean: ## remove what was made, .venv too (and .run unless its daemon is running)
	@rm -rf build dist *.egg-info .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	@if [ -S $(RUN)/sockets/supervisor.sock ] && ss -xl 2>/dev/null | grep -qF '$(RUN)/sockets/'; then \
	  echo 'make clean: .run is in use, left alone' >&2; else rm -rf $(RUN); fi
