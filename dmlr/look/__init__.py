"""One question opened up, and studies over many."""
