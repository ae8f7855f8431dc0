"""Plugins for engines that load models of their own: vLLM."""
