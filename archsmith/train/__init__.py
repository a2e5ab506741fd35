"""Training: one loop for every method, schedules, averaging, recalibration, and the optimisers torch does not have."""
