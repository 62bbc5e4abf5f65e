"""Load a language model: the files of a directory, a preset, adapters, the attention implementation, the device."""
