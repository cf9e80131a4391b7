"""The transport of one host's shared memory."""
