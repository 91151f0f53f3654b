"""optimum-mla."""
