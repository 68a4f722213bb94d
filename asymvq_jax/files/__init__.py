"""What is read from and written to disk: pictures, weights of other programs, outputs."""
