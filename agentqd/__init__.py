"""agentqd: a durable queue in, a durable outbox out, for long AI-agent jobs on a worker box."""

__version__ = "0.1.0"
