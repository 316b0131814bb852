"""Its place lets tests `import tiny`: pytest puts the folder of a conftest on the path."""

from hypothesis import settings

# The same examples on every run; look further with --hypothesis-profile=explore.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("fixed")
