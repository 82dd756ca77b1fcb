"""Training: options, task, optimiser, callbacks and the run folder."""
