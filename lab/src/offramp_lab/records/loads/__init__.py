"""What the batch engine and its guesses are worth under loads like those of use.

Each module is a command, `python -m offramp_lab.records.loads.guesses` and so on, and rewrites its
own part of lab/records/loads.json; `arrivals` adds to lab/records/engine.json.
"""
