"""Dataset files to examples and images."""
