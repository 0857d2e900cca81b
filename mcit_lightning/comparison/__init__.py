"""Comparing finished runs: methods side by side under one protocol, with the statistics over their seeds.

`find` reads the runs and `grouping` groups them: runs of other task sets or orders are never averaged together. `page` draws
one self-contained page, `tables` writes the numbers for papers and spreadsheets, `board` puts the same figures into TensorBoard.
"""
