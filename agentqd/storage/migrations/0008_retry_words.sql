-- 1: its policy is a person's word at a retry; a claim that has lapsed is made again under it.
ALTER TABLE intents ADD COLUMN said INTEGER NOT NULL DEFAULT 0;
-- The run of `task_seq` that had begun when `on_seq` was run again: that run asks no more.
ALTER TABLE dependencies ADD COLUMN heard_run INTEGER;
