#!/usr/bin/env bash
# Runs dtrain on the hosts of a hostfile. Starts torchrun on each of them over ssh.
#
#     launch/torchrun.sh hostfiles/cluster --config configs/cola.yaml
#     launch/torchrun.sh hostfiles/cluster --nnodes 1:2 --max-restarts 3 ...    # elastic: continues with one of two hosts
#     launch/torchrun.sh hostfiles/cluster --export HF_TOKEN ...                # sets a variable on every host
#     launch/torchrun.sh hostfiles/cluster --dry-run ...                        # only prints the commands
#
# Checks every host first. Exits with the job's exit code, prints its message last, and leaves no process on any host.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" "$root/dtrain/commands/launch.py" torchrun "$@"
