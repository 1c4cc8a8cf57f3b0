-- Which files in blobs/ are named: asked when a daemon starts, and when a task is removed.
-- (From here on each copy has a name of its own; an older agentqd would call it damaged.)
CREATE INDEX entries_blob ON entries (blob) WHERE blob IS NOT NULL;
