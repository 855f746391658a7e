"""Steered models inside other people's harnesses: Inspect (inspect_ai) and lm-eval. docs/harnesses.md."""
