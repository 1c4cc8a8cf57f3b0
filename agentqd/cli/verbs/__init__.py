"""The verbs, one a file. Each file has a `command`; `agentqd.cli.group` knows them by name."""
