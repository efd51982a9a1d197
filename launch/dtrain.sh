#!/usr/bin/env bash
# Runs dtrain on the hosts of a hostfile. Starts dtrain's own launcher on each of them over ssh, which imports once and
# forks its ranks.
#
#     launch/dtrain.sh hostfiles/cluster --config configs/cola.yaml
#     launch/dtrain.sh hostfiles/cluster --export HF_TOKEN ...         # sets a variable on every host
#     launch/dtrain.sh hostfiles/cluster --dry-run ...                 # only prints the commands
#
# Checks every host first. Exits with the job's exit code, prints its message last, and leaves no process on any host.
# Restarts on several hosts (--nnodes, --max-restarts) need launch/torchrun.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" "$root/dtrain/commands/launch.py" dtrain "$@"
