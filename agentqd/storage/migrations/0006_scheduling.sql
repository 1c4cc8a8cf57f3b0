-- Runners whose usage limit is reached: none of their tasks starts before `until`. NULL: it is over, the next attempt will tell.
CREATE TABLE runner_limits (
    runner  TEXT PRIMARY KEY,
    since   INTEGER NOT NULL,                  -- of the first time in a row
    until   INTEGER,
    known   INTEGER NOT NULL,                  -- 1: the agent said until when; 0: guessed
    strikes INTEGER NOT NULL,                  -- times in a row
    task_id TEXT NOT NULL                      -- the task that met it last
) WITHOUT ROWID;

-- Ready tasks by runner: looked at only while a runner's limit is reached.
CREATE INDEX tasks_ready_of ON tasks (queue, runner, priority DESC, seq) WHERE state = 'queued';
-- Why tasks wait, summed up.
CREATE INDEX tasks_reason ON tasks (state, queue, reason) WHERE state IN ('blocked', 'held', 'retryable');
