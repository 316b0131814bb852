"""Its place lets tests `import tiny`: pytest puts the folder of a conftest on the path."""

import signal

from hypothesis import settings

# A shell's background job is started with Ctrl-C ignored, and so would be every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run; look further with --hypothesis-profile=explore.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("fixed")
