"""Other libraries run their attention through fastattn."""
