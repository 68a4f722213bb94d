"""The networks, in Flax NNX. Images are NHWC floats in [-1, 1]; masks NHW1, 1 = generate, 0 = preserve."""
