#!/usr/bin/env bash
# Runs dtrain on the hosts of a hostfile with Open MPI's mpirun, which connects to them over ssh itself.
#
#     launch/mpirun.sh hostfiles/cluster --config configs/cola.yaml
#     launch/mpirun.sh hostfiles/cluster --export HF_TOKEN ...         # sets a variable on every host
#     launch/mpirun.sh hostfiles/cluster --dry-run ...                 # only prints the command
#
# Checks every host first. Exits with the job's exit code, prints its message last, and leaves no process on any host.
# Start it on one of the hosts. Ranks get SIGUSR1 for SIGTERM and Ctrl-C, for which mpirun leaves them no time to save.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" "$root/dtrain/commands/launch.py" mpirun "$@"
