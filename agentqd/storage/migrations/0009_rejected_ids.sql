-- The newest rejection of an id that it could be read of: who asks for that task is told, though there is none.
CREATE TABLE rejected_ids (
    id        TEXT PRIMARY KEY,
    entry_seq INTEGER NOT NULL                 -- of what was told of it over completions
) WITHOUT ROWID;
