"""DMLR: test-time latent reasoning for frozen vision-language models (arXiv 2512.12623)."""

import os

# libgomp's idle threads spin, and on a machine that does other work too they take its cores from whoever works. Read
# when torch is loaded, which nothing does before this line.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
