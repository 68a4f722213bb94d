"""The asymmetric VQGAN for Stable Diffusion (arXiv 2306.04632) in JAX."""

from asymvq_jax import former

__version__ = "0.1.0"

former.install()
