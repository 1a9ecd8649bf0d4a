"""How good: what IA2 brings, why, and by which choices; each study is `python -m bench NAME`."""
