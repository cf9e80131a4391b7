"""The strategies: short pure functions that return plans."""
