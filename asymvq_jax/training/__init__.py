"""Training: the optimizers and their schedules, the state, the pure step, and the loop that holds every side effect."""
