"""Figures that a reader drags: live with a kernel, and working without one."""
