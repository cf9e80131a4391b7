"""The checker: order, and provenance."""
