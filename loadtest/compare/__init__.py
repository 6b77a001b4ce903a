"""Colocated against disaggregated workers: same machine, same cores, same load.

question.py    what is asked, checked
shapes.py      the ways to divide the workers
search.py      the highest rate that a shape keeps: brackets, bisection; says at which rate to compare
contender.py   one shape that runs: offers it a load, watches its processes
  judge.py       whether a load that runs can still reach its target
  processes.py   cores and CPU seconds of a process
comparing.py   the whole comparison: searches by turns, then draws of arrivals that both finalists get
verdict.py     what the draws mean, in plain words
model.py       what was found, as data: the JSON file
"""
