"""Which folders agentqd has on the box: what the config says, else what the remote home's owner would choose."""

from __future__ import annotations

import asyncssh

from agentqd.client.boxes import BoxEntry
from agentqd.client.keeper.trouble import NO_SFTP, UNREACHABLE, Trouble
from agentqd.core.folders import Folders, choose_folders


async def open_sftp(connection: asyncssh.SSHClientConnection) -> asyncssh.SFTPClient:
    """Raises Trouble where the box has no SFTP."""
    try:
        return await connection.start_sftp_client()
    except asyncssh.ConnectionLost as error:
        raise Trouble(UNREACHABLE, f"the connection was lost: {error}") from error
    except (asyncssh.Error, OSError) as error:
        raise Trouble(
            NO_SFTP, f"the box has no SFTP ({error}); its sshd_config needs: Subsystem sftp internal-sftp"
        ) from error


async def candidate_folders(entry: BoxEntry, sftp: asyncssh.SFTPClient) -> list[Folders]:
    """Where agentqd may live, best first. One, if the config names both folders."""
    if entry.state_dir and entry.runtime_dir:
        return [Folders(entry.state_dir, entry.runtime_dir)]
    home = str(await sftp.realpath("."))
    uid = (await sftp.stat(home)).uid
    uid = 0 if uid is None else uid
    system = choose_folders({}, 0, entry.state_dir, entry.runtime_dir)
    if uid == 0:
        return [system]
    env = {"HOME": home}
    own = [
        # A user's daemon under systemd has XDG_RUNTIME_DIR; one that was started by hand may not.
        choose_folders(
            {**env, "XDG_RUNTIME_DIR": f"/run/user/{uid}"}, uid, entry.state_dir, entry.runtime_dir
        ),
        choose_folders(env, uid, entry.state_dir, entry.runtime_dir),
    ]
    return list(dict.fromkeys([*own, system]))


async def used_folders(
    candidates: list[Folders], answered: Folders | None, sftp: asyncssh.SFTPClient
) -> Folders:
    """The folders behind the socket that answered, else of a daemon that has run there, else the first."""
    if answered is not None:
        return answered
    for folders in candidates:
        if await sftp.isdir(folders.queue):
            return folders
    return candidates[0]
