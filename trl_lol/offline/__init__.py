"""Trainers on logged, scored completions."""
