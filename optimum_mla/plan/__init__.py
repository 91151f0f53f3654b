"""The distribution of a budget over the layers."""
