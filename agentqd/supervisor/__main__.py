"""python -m agentqd.supervisor"""

import sys

from agentqd.supervisor.main import main

sys.exit(main())
