"""What every layer may use: checks, warnings, failures, forks. Knows nothing of attention."""
