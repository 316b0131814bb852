"""The command line's tests have models that spell."""

from spelled import models

__all__ = ["models"]
