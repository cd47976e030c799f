"""What reports are made of: figures, tables, galleries, provenance, policy. Parts know records, not models."""
