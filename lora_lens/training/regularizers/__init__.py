"""What holds a model back from forgetting while it learns, one remedy per module.

Each adds a term to the loss of the new task. In a run by itself they guard the retained task; in a sequence
the strategy's one guards the tasks before. What is kept does not grow with the number of tasks.
"""
