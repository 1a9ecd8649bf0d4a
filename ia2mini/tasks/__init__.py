"""Tasks: the catalog, where their rows come from, and how answers are parsed."""

from .answers import same_answer
from .catalog import Example, Task, all_tasks, find_task
from .sources import Examples, custom_task, load_examples

__all__ = [
    "Example",
    "Examples",
    "Task",
    "all_tasks",
    "custom_task",
    "find_task",
    "load_examples",
    "same_answer",
]
