"""Models for others: files that run without this package, checked to compute the same."""
