"""Nothing but its place: pytest puts the folder of a conftest on the path, so tests may `import tiny`."""
