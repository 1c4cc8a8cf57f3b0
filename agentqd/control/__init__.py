"""The daemon's side of the control socket: HTTP/1.1 with JSON over a Unix socket (docs/api.md)."""
