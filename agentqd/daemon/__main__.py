"""`python -m agentqd.daemon`."""

import sys

from agentqd.daemon.main import main

sys.exit(main())
