"""asymvq-jax: the asymmetric VQGAN (arXiv 2306.04632) for JAX: training, evaluation, inference, conversion."""

__version__ = "0.1.0"
