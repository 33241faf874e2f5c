"""Tasks: what a task file may say, reading it, choosing tasks, settling one for a model, filling its templates.

A task file is an lm-eval task YAML with a few more keys (docs/eval.md). The YAML files beside are those of the package.
"""
