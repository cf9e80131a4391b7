"""What carries tensors between ranks. Knows no plan."""
