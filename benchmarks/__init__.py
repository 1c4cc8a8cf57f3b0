"""Speed as ratios: each row measures a floor and agentqd side by side, in the same run. `python -m benchmarks`."""
