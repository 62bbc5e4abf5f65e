"""The command line: `fastattn` and its subcommands."""
