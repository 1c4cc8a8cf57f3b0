-- Claims stand in a line of their own: a task that is run again stands at its end, whatever its seq.
ALTER TABLE intents ADD COLUMN place INTEGER NOT NULL DEFAULT 0;  -- the same for all paths of a task
ALTER TABLE intents ADD COLUMN head TEXT NOT NULL DEFAULT '/';    -- the path up to its first pattern: what overlaps is found by it
UPDATE intents SET place = task_seq;
UPDATE intents SET head = path WHERE NOT (instr(path, '*') OR instr(path, '?') OR instr(path, '['));
CREATE INDEX intents_heads ON intents (head, place);
CREATE INDEX intents_line ON intents (place);

-- Of each task that waits for a place: the newest claim before it that overlaps. It is looked at again when that one ends.
CREATE TABLE claim_waits (
    task_seq INTEGER PRIMARY KEY,
    on_seq   INTEGER NOT NULL
);
CREATE INDEX claim_waits_on ON claim_waits (on_seq);

-- Those that wait now are looked at when the daemon starts.
UPDATE tasks SET wake_at = 0 WHERE state = 'blocked' AND reason = 'write_conflict';
