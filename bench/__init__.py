"""How fast, and against whom: `python -m bench --help`, or bench/README.md."""
