"""DMLR: test-time latent reasoning for frozen vision-language models (arXiv 2512.12623)."""
