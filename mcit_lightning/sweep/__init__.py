"""Sweeps: several strategies, task orders and seeds under one protocol, a run directory per cell.

`runs` and `plan` say which cells there are, `execute` runs those that are not finished, `mcit_lightning.comparison` aggregates.
"""
