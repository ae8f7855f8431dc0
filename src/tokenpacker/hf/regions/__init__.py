"""Regions as users give them, to what the model reads."""
