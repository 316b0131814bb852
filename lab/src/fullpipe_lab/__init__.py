"""The laboratory beside Fullpipe: what measures, imagines or reports. Fullpipe itself never imports it."""
