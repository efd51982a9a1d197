"""`python -m dtrain.cluster FILE`: checks a hostfile and prints its hosts and slots."""

import sys

from dtrain.cluster.hostfile import main

sys.exit(main(sys.argv[1:]))
