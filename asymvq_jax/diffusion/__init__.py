"""Stable Diffusion 1, 2 and XL in JAX: from prompt, picture and mask to the latent that our decoder takes."""
