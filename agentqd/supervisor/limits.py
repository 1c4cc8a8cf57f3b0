"""The supervisor's own fixed limits, units last. What is shared with the daemon is in core/limits.py."""

from __future__ import annotations

from agentqd.core.limits import KIB, MIB

# Connections.
LISTEN_BACKLOG = 64
CONNECTIONS_MAX = 16
HELLO_WITHIN_S = 10.0
HELLO_LINE_BYTES_MAX = 64 * KIB
RECEIVE_BYTES = 64 * KIB
LOOK_AHEAD_BYTES = 512 * KIB  # more than the kernel keeps for a socket
REQUESTS_A_TURN_MAX = 16  # then the loop looks at exits, deadlines and other connections again
PENDING_REPORT_BYTES_MAX = 16 * MIB  # beyond a Welcome, which may be longer
ACCEPT_PAUSE_S = 0.1  # after EMFILE and the like
SEND_BYTES = 256 * KIB

# Ending a tree.
LEFTOVER_LOOK_AGAIN_S = 0.01  # a process in the middle of exiting is not "left behind"
LEFTOVER_GRACE_S = 2.0
END_POLL_MIN_S = 0.005
END_POLL_MAX_S = 0.2
KILL_ROUNDS_MAX = 20  # SIGKILL passes in one go while new processes still turn up
STUCK_AFTER_S = 5.0
STUCK_REPEAT_S = 60.0
TREE_PROCESSES_MAX = 20_000
SURVIVOR_GRACE_S = 1.0
SURVIVOR_POLL_S = 0.1

# Watching a worker.
SILENCE_POLL_MIN_S = 0.05
SILENCE_POLL_MAX_S = 1.0
OUTPUT_POLL_MIN_S = 0.05
OUTPUT_POLL_MAX_S = 1.0

# Foreign commands.
EXECS_MAX = 64
EXEC_GRACE_S = 1.0
EXEC_CAPTURE_BYTES_MAX = 1 * MIB

# Itself.
LINGER_S = 60.0
READY_FOLDERS = 8
READY_PAUSE_S = 0.003
EXIT_FILE_RETRY_S = 5.0
EXIT_FILE_BYTES_MAX = 256 * KIB
DEFERRED_RUNS_MAX = 1024
ENVIRON_BYTES_MAX = 4 * MIB
IDLE_WAKE_S = 60.0
