"""What the Makefile calls. Nothing here is part of the library."""
