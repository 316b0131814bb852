"""Tests of the laboratory; tiny models and the settings of hypothesis are those of the package's own tests."""

import signal

from hypothesis import settings
from spelled import models

__all__ = ["models"]

signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
