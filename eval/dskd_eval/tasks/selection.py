"""Tasks chosen by suite, name or file."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

from dskd_eval.errors import UserError, nearest
from dskd_eval.tasks.load import load_task
from dskd_eval.tasks.spec import SUITES, TASK_FOLDER, TaskSpec


@functools.cache
def builtin_tasks() -> Mapping[str, TaskSpec]:
    """The tasks of the package by name, in the order of the suites."""
    specs = [load_task(path) for path in sorted(TASK_FOLDER.glob("*.yaml"))]
    order = ["dolly", "self_instruct", "vicuna", "s_ni", "unni", "ifeval"]
    rank = {name: place for place, name in enumerate(order)}
    specs.sort(key=lambda spec: (SUITES.index(spec.suite), rank.get(spec.name, 99), spec.name))
    return {spec.name: spec for spec in specs}


def select(suites: Iterable[str], tasks: Iterable[str], files: Iterable[str | Path]) -> list[TaskSpec]:
    """Tasks of suites, named tasks and task files, once each. UserError names the nearest known names."""
    known = dict(builtin_tasks())
    chosen: dict[str, TaskSpec] = {}
    for suite in suites:
        if suite not in SUITES:
            raise UserError(
                "--suite", expected="one of " + ", ".join(SUITES), got=repr(suite), fix=nearest(suite, SUITES)
            )
        chosen |= {name: spec for name, spec in known.items() if spec.suite == suite}
    for name in tasks:
        if name not in known:
            raise UserError("--tasks", expected="a task of `dskd-eval list`", got=repr(name), fix=nearest(name, known))
        chosen[name] = known[name]
    for file in files:
        spec = load_task(Path(file).expanduser().resolve())
        if spec.name in chosen:
            raise UserError(
                f"--task-file {file}",
                expected="a task name of its own",
                got=f"{spec.name!r}, which is taken",
                fix="Change `task:` in the file.",
            )
        chosen[spec.name] = spec
    if not chosen:
        raise UserError(
            "--suite",
            expected="at least one suite or task",
            got="none",
            fix="Add --suite instruct,math,code, or --task-file FILE for a task of your own.",
        )
    return list(chosen.values())
