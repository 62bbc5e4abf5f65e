"""Generate text: the engine, the choice of tokens, chat templates, and text from tokens."""
