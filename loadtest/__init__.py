"""Open-loop load against Tandem over gRPC or any OpenAI endpoint, and its metrics as `vllm bench serve` defines them.

schedule/plan.py   what is asked for, checked; makes the schedule
  arrivals.py      when requests arrive
  workloads.py     what they ask (traces.py reads and makes up traces)
runner.py          sends a schedule on time, whatever the server does
targets/           to whom: Tandem by gRPC, or an OpenAI endpoint
metrics.py         outcomes in, figures out
session.py         one whole measurement: check, warm up, run, report
"""
