-- What a sink wants to know at the next try of a row (which recipients of a mail are done). Bounded: core/limits.py.
ALTER TABLE outbox ADD COLUMN progress BLOB;

-- Files that an entry brings along: our own copies in blobs/. They stay as long as the entry does.
CREATE TABLE attachments (
    entry_seq INTEGER NOT NULL,
    blob      TEXT NOT NULL,
    PRIMARY KEY (entry_seq, blob)
) WITHOUT ROWID;
CREATE INDEX attachments_of_blob ON attachments (blob);
