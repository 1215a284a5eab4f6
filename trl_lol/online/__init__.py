"""Trainers that generate while they train."""
