"""Does it learn: held-out pairs, metrics, curves, trackers, the log file."""
