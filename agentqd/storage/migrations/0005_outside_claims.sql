-- Write claims of processes that are no task's: a person's editor, a cron job. A claim lives as long as its process does;
-- a process is (pid, start, boot id). Their paths stand in `intents`, in the same line, under the negative seq.
CREATE TABLE outside_claims (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused
    id        TEXT NOT NULL UNIQUE,               -- claim-...
    name      TEXT NOT NULL,
    uid       INTEGER NOT NULL,
    user      TEXT NOT NULL,
    pid       INTEGER NOT NULL,
    pid_start INTEGER NOT NULL,
    boot_id   TEXT NOT NULL,
    policy    TEXT NOT NULL,
    asked_at  INTEGER NOT NULL,
    held_at   INTEGER                             -- NULL: it waits for its places
);

-- Who waits for a place to write, and who has begun and is between attempts: looked for when a claim is released or lapses.
-- (In `intents`, expires_at says since when a claim has lapsed; such a row keeps its place and has no head.)
CREATE INDEX tasks_write_blocked ON tasks (seq) WHERE state = 'blocked' AND reason = 'write_conflict';
CREATE INDEX tasks_between_attempts ON tasks (seq)
    WHERE run_attempts > 0 AND state IN ('scheduled', 'queued', 'held', 'retryable');

-- Conflicts ever recorded, by policy: `conflicts` itself keeps the newest only.
CREATE TABLE conflict_counts (
    policy TEXT PRIMARY KEY,
    n      INTEGER NOT NULL
) WITHOUT ROWID;
INSERT INTO conflict_counts (policy, n) SELECT policy, count(*) FROM conflicts GROUP BY policy;
CREATE TRIGGER conflicts_counted AFTER INSERT ON conflicts BEGIN
    INSERT OR IGNORE INTO conflict_counts (policy, n) VALUES (new.policy, 0);
    UPDATE conflict_counts SET n = n + 1 WHERE policy = new.policy;
END;
