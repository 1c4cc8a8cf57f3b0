"""The keeper: a small program on the laptop that holds one SSH connection to one box (docs/laptop.md).

Verbs never import this package: they start it (`agentqd.client.kept`) and speak to its socket. Only `agentqctl box test`
uses its parts directly.
"""
