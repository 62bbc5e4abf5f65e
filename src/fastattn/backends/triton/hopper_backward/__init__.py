"""The backward for Hopper GPUs (compute capability 9.0), in Gluon: `launch.py` says which calls it serves."""
