"""`agentqctl`: what people and scripts use. One verb, one file in `verbs/`, loaded only when it is run."""
