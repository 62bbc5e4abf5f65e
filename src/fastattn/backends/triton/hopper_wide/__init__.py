"""The forward for Hopper GPUs and head dims above 256, in Gluon."""
