"""Scripts, each run by its peer's own interpreter: nothing here is imported, and they import only each other."""
