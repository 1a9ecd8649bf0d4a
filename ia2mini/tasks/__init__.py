"""Tasks: the catalog, where their rows come from, and how answers are parsed."""

from .answers import parse_boxed, parse_hashes, parse_number, parse_text
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
    "parse_boxed",
    "parse_hashes",
    "parse_number",
    "parse_text",
]
