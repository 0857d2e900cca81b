"""Sweeps: several strategies, task orders and seeds under one protocol, a run directory per cell.

`plan` says which cells there are, `execute` runs those that are not finished, and `mcit_lightning.comparison` aggregates.
"""
