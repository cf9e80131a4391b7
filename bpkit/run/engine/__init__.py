"""One rank runs its row of a plan."""
