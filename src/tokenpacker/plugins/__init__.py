"""Plugins for tools that load models of their own: vLLM and lmms-eval."""
