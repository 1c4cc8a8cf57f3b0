-- Write claims of processes that are no task's: a person's editor, a cron job. A claim lives as long as its process does;
-- a process is (pid, start, boot id).
CREATE TABLE outside_claims (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT,  -- order among themselves; never reused
    id        TEXT NOT NULL UNIQUE,               -- claim-...
    name      TEXT NOT NULL,
    uid       INTEGER NOT NULL,
    user      TEXT NOT NULL,
    pid       INTEGER NOT NULL,
    pid_start INTEGER NOT NULL,
    boot_id   TEXT NOT NULL,
    policy    TEXT NOT NULL,
    after_seq INTEGER NOT NULL,                   -- tasks up to this seq are older than the claim
    asked_at  INTEGER NOT NULL,
    held_at   INTEGER                             -- NULL: it waits for its places
);
CREATE TABLE outside_paths (
    claim_seq INTEGER NOT NULL,
    path      TEXT NOT NULL,                      -- resolved
    given     TEXT NOT NULL,                      -- as written
    PRIMARY KEY (claim_seq, path)
) WITHOUT ROWID;

-- Who waits for a place to write, and who has begun and is between attempts: looked for when a claim is released or lapses.
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
