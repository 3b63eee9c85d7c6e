"""What the batch engine and its guesses are worth under loads like those of use.

Each module is a command, `python -m benchmarks.loads.guesses` and so on, and rewrites its own part
of benchmarks/records/loads.json; `arrivals` adds to benchmarks/records/engine.json.
"""
