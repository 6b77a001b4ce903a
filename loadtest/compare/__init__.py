"""Colocated against disaggregated workers: same machine, same cores, same load."""
