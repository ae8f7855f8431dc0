"""Commands that put a model where programs and people reach it."""
