"""Scoring answers, the accuracy matrix and its summaries, and what a run writes for people to read."""
