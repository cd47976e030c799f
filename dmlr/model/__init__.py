"""The frozen model: embeddings over a cached prefix in, logits and attention out."""
