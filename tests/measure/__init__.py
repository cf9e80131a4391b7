"""Tests of what is measured: made traces with known answers, and small real runs."""
