#!/usr/bin/env bash
# Runs dtrain on the hosts of a hostfile with Open MPI's mpirun, which goes to them over ssh itself.
#
#     launch/mpirun.sh hostfiles/cluster --config configs/cola.yaml
#     launch/mpirun.sh hostfiles/cluster --export HF_TOKEN ...         # variables that are to be set everywhere
#     launch/mpirun.sh hostfiles/cluster --dry-run ...                 # only prints the command
#
# Looks at every host first. Ends with the job's exit code and its message, and leaves nothing running anywhere.
# Start it on one of the hosts. SIGTERM and Ctrl-C reach the ranks as SIGUSR1: mpirun would leave them no time to save.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" "$root/dtrain/commands/launch.py" mpirun "$@"
