"""The reference's training losses: L1 and LPIPS for reconstruction, a hinge GAN with an adaptive weight."""
