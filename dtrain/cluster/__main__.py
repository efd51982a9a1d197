"""`python -m dtrain.cluster FILE`: prints the hosts and slots of a hostfile."""

import sys

from dtrain.cluster.hostfile import main

sys.exit(main(sys.argv[1:]))
