"""The run as a directory: its lock, journal and checkpoints, live progress, and how it is asked to stop."""
