"""Scorers: one class for each way to judge answers, with all that is known of it. `registry` has them by name."""
