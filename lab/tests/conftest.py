"""Tests of the laboratory; `tiny` and the settings of hypothesis are those of the package's own tests."""

import signal

from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

