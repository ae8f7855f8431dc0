"""The command line. Importing it loads no torch: each command imports what it needs when it runs."""

from tokenpacker.cli.app import app, main

__all__ = ["app", "main"]
