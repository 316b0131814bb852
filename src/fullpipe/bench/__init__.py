"""Measuring: prompts, recordings, metrics, reports."""
