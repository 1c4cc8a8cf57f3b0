"""Who may use the control socket: the daemon's own user, root, and the members of `control.group`.

The kernel says who connected (SO_PEERCRED); the socket's mode is a second wall, not the only one.
"""

from __future__ import annotations

import grp
import os
import pwd

from agentqd.system.peercred import Peer


def always_allowed(peer: Peer) -> bool:
    return peer.uid in (0, os.geteuid())


def member(peer: Peer, group: str) -> bool:
    """Is the peer's user in the group: by the group it connected with, its primary, or a supplementary one. May block (NSS)."""
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        return False
    if peer.gid == gid:
        return True
    try:
        user = pwd.getpwuid(peer.uid)
    except KeyError:
        return False
    return gid in os.getgrouplist(user.pw_name, user.pw_gid)
