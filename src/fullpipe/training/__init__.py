"""Draft modules: their training text, their training."""
