"""The server: vLLM's own OpenAI-compatible one behind our policy (docs/serving.md)."""
