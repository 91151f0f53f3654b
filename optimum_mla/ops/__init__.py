"""Functions of tensors alone: low-rank factors, choice of rotary pairs, rotation, and attention in latent space."""
