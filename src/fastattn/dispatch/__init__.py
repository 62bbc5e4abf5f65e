"""From a validated call to the backend that serves it."""
