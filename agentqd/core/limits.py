"""Every fixed limit, named in one place, units last. What a person may change is in `settings.Limits`."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# Task fields (hostile input is bounded before anything else looks at it).
TASK_ID_CHARS_MAX = 64
TASK_NAME_CHARS_MAX = 256
LABELS_MAX = 32
LABEL_CHARS_MAX = 128
ARGV_ITEMS_MAX = 4096
ARGV_BYTES_MAX = 1 * MIB  # the kernel's own limit for one argument is 128 KiB, for all about 2 MiB
ENV_ITEMS_MAX = 512
AFTER_MAX = 1000
WRITES_TO_MAX = 256
PATH_BYTES_MAX = 4096  # the kernel's PATH_MAX
PATH_NAME_BYTES_MAX = 255
CONFLICTS_TOLD_MAX = 20  # of one newcomer: named in its refusal, alert and the log of conflicts
ANCESTORS_MAX = 1000  # tasks that one comes after, through others; beyond, they count as strangers
WAITS_FOLLOWED_MAX = 10_000  # when a task that others come after is run again
EXPECT_FILES_MAX = 256
DELIVER_TO_MAX = 32
PRIORITY_ABS_MAX = 1_000_000
MAX_ATTEMPTS_MAX = 1000
DURATION_MAX_S = 10 * 366 * 86400
DURATION_MIN_S = 0.001
SIZE_MAX = 1024**5
RATE_COUNT_MAX = 1_000_000

# Intake.
INTAKE_CHUNK_BYTES = 1 * MIB
INTAKE_BATCH_LINES_MAX = 10_000
POSITION_DIGEST_BYTES = 4096
REJECTED_RAW_BYTES_MAX = 64 * KIB

# Journal.
JOURNAL_BATCH_UNITS_MAX = 512
WAL_AUTOCHECKPOINT_PAGES = 2000
EVENT_DATA_BYTES_MAX = 16 * KIB

# Results.
STDOUT_TAIL_BYTES = 4 * KIB
ARTIFACTS_MAX = 1000
ARTIFACT_HASH_BYTES_MAX = 1024 * MIB
ENTRY_INLINE_BYTES_MAX = 256 * KIB
JSON_CHECK_BYTES_MAX = 32 * MIB
ENTRY_BYTES_MAX = 256 * MIB
ENTRIES_PER_ATTEMPT_MAX = 10_000  # names in its drop folder that are taken; of the rest one row tells
ENTRY_KEY_BYTES_MAX = 255
ATTACHMENTS_MAX = 100  # of one entry

# Usage limits of agents: what is looked at of a failed attempt's stdout and of its stderr, and what is believed.
USAGE_LIMIT_TAIL_BYTES = 32 * KIB
USAGE_LIMIT_LINE_CHARS_MAX = 8 * KIB
USAGE_LIMIT_TEXT_CHARS_MAX = 300
USAGE_LIMIT_AHEAD_MAX_S = 7 * 86400
USAGE_LIMIT_SIGNS_MAX = 32  # texts that a runner may have for it
USAGE_LIMIT_SIGN_CHARS_MAX = 200

# Waiting tasks: what is counted for people.
AHEAD_SEEN_MAX = 1000  # tasks that go first; beyond them "more than"
WAITING_REASONS_SEEN_MAX = 100_000  # waiting tasks of one state whose reasons are summed up
DEPENDENCIES_SHOWN = 20  # tasks that one waits for, named
FREED_AT_ONCE = (
    1000  # tasks that the end of one frees in its own transaction; the others follow in the next ones
)

# Supervisor protocol and control socket.
WIRE_MESSAGE_BYTES_MAX = 128 * MIB  # a 16 MiB prompt of control characters is 96 MiB of JSON
WIRE_PENDING_BYTES_MAX = 64 * MIB
EXEC_OUTPUT_BYTES_MAX = 16 * KIB
CONTROL_BODY_BYTES_MAX = 64 * MIB
LIST_ROWS_MAX = 10_000
LIST_ROWS_DEFAULT = 100
LEFT_BEHIND_NAMED_MAX = 50

# Sinks.
SINK_ERROR_CHARS_MAX = 500
COMPLETIONS_BATCH_MAX = 1000
RETRY_AFTER_MAX_S = 86400.0
PROGRESS_BYTES_MAX = 16 * KIB  # what a sink keeps with a row between tries
CONCURRENCY_START = 5  # to one destination
CONCURRENCY_MAX = 20
SINK_CONCURRENCY_MAX = 1000  # what a config may ask for
FRESH_ROWS_MAX = 2000  # new rows kept in memory a sink; beyond them they are read back from the journal
FRESH_BYTES_MAX = 16 * MIB
PAGE_ROWS = 256  # due rows read from the journal at once (a sink that takes batches: one batch)
LOOP_TURN_S = 30.0  # a loop with nothing to do turns this often: the watchdog and `stalled_loop` count on it
LOOP_WORK_S = 600.0  # so long a thread may work for a loop that counts as turning
PAGE_ROWS_LOW = 64  # with so few left the next page is read beside the sends
PAGE_BYTES_MAX = 8 * MIB
ORDER_WINDOW = 20_000  # entries looked through at once for an ordered sink's next rows
ROWS_A_COMMIT = 500  # of a sink whose rows are all held, released, expired or woken
ALERTS_A_GROUP_MAX = (
    50  # of one kind about one sink (or of all handed-over files) in ALERT_GROUP_S, told one by one
)
ALERT_GROUP_S = 3600.0
UNKNOWN_SINKS_MAX = 64  # names that entries may have dead rows under, though the config has none of them
TALLY_STEP_S = 10.0  # how finely a sink's rates are counted
SINK_REASON_CHARS_MAX = 200  # why a person has disabled a sink
CONTACT_EVERY_S = 10.0  # a peer that contacts us wakes its sinks at most so often
CONTACT_HEADER_CHARS_MAX = 512

# Breaker of a sink (Convoy, Postfix).
BREAKER_ROW = 5  # connection failures in a row
BREAKER_WINDOW = 10
BREAKER_RATIO = 0.7  # of the last ten tries, within five minutes
BREAKER_WINDOW_S = 300.0
BREAKER_OPEN_S = 60.0
BREAKER_OPEN_MAX_S = 900.0
LEFT_ALONE_MAX_S = (
    BREAKER_OPEN_MAX_S  # a sink whose receiver asks for it (Retry-After); the row itself waits longer
)

# The laptop's spool, for each box.
SPOOL_ENTRIES_MAX = 10_000
SPOOL_BYTES_MAX = 1024 * MIB

# Write claims.
CLAIM_PATH_BYTES_MAX = 4096
OUTSIDE_CLAIMS_MAX = 1000
OUTSIDE_CLAIMS_PER_USER_MAX = 200
BLOB_LEFT_OVER_KEPT_S = 86_400  # of copies in blobs/ that no entry names: time to put a journal back
CONFLICTS_KEPT_MAX = 100_000
WAITERS_NAMED_MAX = 20

# What a task wrote outside of its declaration.
UNDECLARED_FILES_MAX = 100_000  # looked at
UNDECLARED_LOOK_S = 10.0
UNDECLARED_NAMED_MAX = 100
