"""The layers, each with forward and both halves of backward written out."""
