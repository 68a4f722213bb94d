"""Stable Diffusion 1 and 2 in JAX: from prompt, picture and mask to the latent that our decoder takes."""
