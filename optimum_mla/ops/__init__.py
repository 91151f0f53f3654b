"""Pure tensor functions: low-rank factors, choice of rotary pairs, rotation, attention in latent space."""
