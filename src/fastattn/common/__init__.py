"""Used by every layer, and independent of attention: checks, warnings, failures, forks, printable text."""
