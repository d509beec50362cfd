"""Data sets on disk, and the order in which training reads them. Knows nothing of models."""
