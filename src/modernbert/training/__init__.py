"""The engine of every run of training: steps, optimizers, schedules, checkpoints, many processes, reports."""
