-- Times are microseconds since the epoch. Numbers (seq) are given by the daemon, grow, and are never reused.
-- Every change of a `state` column goes through the tables in core/lifecycle.py and core/outbox.py.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value
) WITHOUT ROWID;

CREATE TABLE tasks (
    seq          INTEGER PRIMARY KEY,          -- order of acceptance
    id           TEXT NOT NULL UNIQUE,
    name         TEXT NOT NULL,
    queue        TEXT NOT NULL,
    runner       TEXT NOT NULL,
    priority     INTEGER NOT NULL,
    state        TEXT NOT NULL,
    result       TEXT,                         -- exactly when state = 'finished'
    reason       TEXT,                         -- why it ended so, or why it waits
    detail       TEXT,                         -- for people
    run          INTEGER NOT NULL,             -- 1; +1 with each `agentqctl retry`
    attempt      INTEGER NOT NULL,             -- attempts begun so far, over all runs (folder attempt-N)
    run_attempts INTEGER NOT NULL,             -- attempts used in this run
    submitted_at TEXT,                         -- as the submitter wrote it
    accepted_at  INTEGER NOT NULL,
    run_at       INTEGER NOT NULL,             -- when this run was accepted: total_timeout counts from here
    started_at   INTEGER,                      -- of the newest attempt
    finished_at  INTEGER,
    wake_at      INTEGER,                      -- look again at this time (start time, backoff, expiry, alerts)
    content      BLOB NOT NULL,                -- what makes a replay the same task
    source       TEXT NOT NULL,                -- JSON: kind, file, offset, length
    spec         BLOB NOT NULL,                -- the task as it was written
    prompt       BLOB                          -- a prompt_ref's content, copied at admission
);
CREATE INDEX tasks_ready ON tasks (queue, priority DESC, seq) WHERE state = 'queued';
CREATE INDEX tasks_active ON tasks (state) WHERE state IN ('running', 'stopping');
CREATE INDEX tasks_waiting ON tasks (state, seq) WHERE state IN ('scheduled', 'blocked', 'held', 'retryable');
CREATE INDEX tasks_unsuccessful ON tasks (seq) WHERE state = 'finished' AND result <> 'success';
CREATE INDEX tasks_wake ON tasks (wake_at) WHERE wake_at IS NOT NULL;
CREATE INDEX tasks_finished ON tasks (finished_at) WHERE state = 'finished';

-- The newest task under an id whose dedup time had passed (`X` -> `X-2`).
CREATE TABLE ids (
    id       TEXT PRIMARY KEY,
    newest   TEXT NOT NULL,
    replays  INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE dependencies (
    task_seq INTEGER NOT NULL,
    on_seq   INTEGER NOT NULL,
    PRIMARY KEY (on_seq, task_seq)
) WITHOUT ROWID;
CREATE INDEX dependencies_of ON dependencies (task_seq);

CREATE TABLE attempts (
    task_seq   INTEGER NOT NULL,
    attempt    INTEGER NOT NULL,
    run        INTEGER NOT NULL,
    epoch      INTEGER NOT NULL,               -- of the daemon that claimed it
    instance   TEXT NOT NULL,                  -- of the supervisor it was claimed for
    boot_id    TEXT NOT NULL,
    claimed_at INTEGER NOT NULL,
    pid        INTEGER,
    pid_start  INTEGER,
    started_at INTEGER,
    ended_at   INTEGER,
    intent     TEXT,                           -- why we are ending it (cancelled, result_grace, ...)
    exit_code  INTEGER,
    signal     INTEGER,
    result     TEXT,
    reason     TEXT,
    evidence   TEXT,                           -- JSON
    PRIMARY KEY (task_seq, attempt)
) WITHOUT ROWID;

-- Outbox entries: what is to be delivered. The payload is stored once and sent as stored.
CREATE TABLE entries (
    seq         INTEGER PRIMARY KEY,
    delivery_id TEXT NOT NULL UNIQUE,
    task_seq    INTEGER,                       -- NULL: about no task
    run         INTEGER NOT NULL,
    attempt     INTEGER NOT NULL,
    kind        TEXT NOT NULL,                 -- result, entry, alert, rejection
    key         TEXT NOT NULL,
    type        TEXT NOT NULL,                 -- CloudEvents type
    at          INTEGER NOT NULL,
    bytes       INTEGER NOT NULL,
    sha256      BLOB NOT NULL,                 -- of the payload
    payload     BLOB,                          -- the data object as JSON
    blob        TEXT                           -- or the file in blobs/ that holds the entry's content
);
CREATE INDEX entries_of_task ON entries (task_seq);
CREATE INDEX entries_alerts ON entries (at) WHERE kind = 'alert';

-- Outbox rows: one entry on its way to one sink.
CREATE TABLE outbox (
    entry_seq    INTEGER NOT NULL,
    sink         TEXT NOT NULL,
    state        TEXT NOT NULL,
    attempts     INTEGER NOT NULL,
    created_at   INTEGER NOT NULL,
    due_at       INTEGER,                      -- next try, jitter included; only while open
    delivered_at INTEGER,
    position     INTEGER,                      -- the seq that the sink gave it (completions)
    last_error   TEXT,
    PRIMARY KEY (entry_seq, sink)
) WITHOUT ROWID;
CREATE INDEX outbox_due ON outbox (sink, due_at, entry_seq) WHERE state IN ('pending', 'delivering', 'retryable');
CREATE INDEX outbox_oldest ON outbox (created_at) WHERE state IN ('pending', 'delivering', 'retryable');
CREATE INDEX outbox_position ON outbox (sink, position) WHERE position IS NOT NULL;
CREATE INDEX outbox_open ON outbox (state) WHERE state IN ('held', 'dead');

CREATE TABLE tries (
    entry_seq INTEGER NOT NULL,
    sink      TEXT NOT NULL,
    n         INTEGER NOT NULL,
    at        INTEGER NOT NULL,
    outcome   TEXT NOT NULL,
    reason    TEXT,
    PRIMARY KEY (entry_seq, sink, n)
) WITHOUT ROWID;

CREATE TABLE intents (
    task_seq   INTEGER NOT NULL,
    path       TEXT NOT NULL,                  -- resolved
    given      TEXT NOT NULL,                  -- as written
    policy     TEXT NOT NULL,
    claimed_at INTEGER NOT NULL,
    expires_at INTEGER,
    PRIMARY KEY (path, task_seq)
) WITHOUT ROWID;
CREATE INDEX intents_of ON intents (task_seq);

CREATE TABLE conflicts (
    seq        INTEGER PRIMARY KEY,
    at         INTEGER NOT NULL,
    task_id    TEXT,
    name       TEXT NOT NULL,
    path       TEXT NOT NULL,
    other_id   TEXT NOT NULL,
    other_path TEXT NOT NULL,
    policy     TEXT NOT NULL
);

CREATE TABLE consumers (
    name         TEXT PRIMARY KEY,
    acknowledged INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE sources (
    source   INTEGER PRIMARY KEY,
    name     TEXT NOT NULL,
    dev      INTEGER NOT NULL,
    ino      INTEGER NOT NULL,
    btime_ns INTEGER NOT NULL,
    offset   INTEGER NOT NULL,
    digest   TEXT NOT NULL,                    -- of the at most 4 KiB before the offset
    role     TEXT NOT NULL,
    since    INTEGER NOT NULL
);

-- Append-only and hash-chained: hash = sha256(previous hash, seq, at, task id, event, data).
CREATE TABLE events (
    seq     INTEGER PRIMARY KEY,
    at      INTEGER NOT NULL,
    task    TEXT,
    event   TEXT NOT NULL,
    data    TEXT NOT NULL,
    hash    BLOB NOT NULL
);
CREATE INDEX events_of ON events (task, seq);

-- Sums that `status` shows, kept in the same transactions, so that no count ever walks a million rows.
CREATE TABLE task_counts (
    queue  TEXT NOT NULL,
    state  TEXT NOT NULL,
    result TEXT NOT NULL,
    n      INTEGER NOT NULL,
    PRIMARY KEY (queue, state, result)
) WITHOUT ROWID;
CREATE TABLE outbox_counts (
    sink  TEXT NOT NULL,
    state TEXT NOT NULL,
    n     INTEGER NOT NULL,
    PRIMARY KEY (sink, state)
) WITHOUT ROWID;

CREATE TABLE paused_queues (
    queue TEXT PRIMARY KEY,
    at    INTEGER NOT NULL
) WITHOUT ROWID;
