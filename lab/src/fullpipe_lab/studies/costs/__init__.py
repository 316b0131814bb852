"""`fullpipe` as it comes against every other method at its best, on clusters where rows are free and where they cost:
virtual time, recorded answers."""
