"""What reports are made of: tables, galleries, provenance, policy, index. Parts know records, not models."""
