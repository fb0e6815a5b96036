"""Training: recipes, schedules, data, and the run, as data and NumPy; a backend's engine steps.

The core says which images, which learning rate, how far the training has come, and what is written
where; an `Engine` of a framework computes a step, an evaluation, and a checkpoint of its own.
"""
