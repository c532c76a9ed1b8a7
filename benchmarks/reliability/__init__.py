"""How reliable the package is: random wrong files for every reader, and faults in the middle of runs.

`make fuzz` and `make faults` run them and write figures, and docs/reliability.md from these.
"""
