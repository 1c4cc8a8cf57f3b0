"""The other side of the control socket: how a program on the box (later: on a laptop) talks to the daemon.

Stairs of this room, from below: `channel` (bytes to and from one daemon), `http` (one strict HTTP/1.1 exchange),
`connection` (JSON, errors, retries), `queuefile` (the front door without a daemon), `box` (which daemon, and both of
these as one object that every verb gets). Nothing here loads the daemon's code or is Linux-only.
"""
