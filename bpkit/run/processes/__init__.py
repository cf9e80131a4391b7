"""The workers' processes: launched, watched and ended. Knows no plan."""
