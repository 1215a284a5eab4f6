"""
Every method on the same work: `python -m benchmarks.run --suite quick`. A *task* (task.py, tasks/) is a reference
policy, logged completions with rewards and a held-out evaluator; a *method* (methods.py) is a trainer of TRL or
trl_lol with a config; the harness (harness.py) runs one with the other, a process a run, and writes a record
(records.py), from which come tables and plots (tables.py).
"""
