"""Weights between JAX and PyTorch: names, layouts, files, and the command line `python -m asymvq_jax.convert`."""
