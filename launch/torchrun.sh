#!/usr/bin/env bash
# Runs dtrain on the hosts of a hostfile, with torchrun on each of them, started over ssh.
#
#     launch/torchrun.sh hostfiles/cluster --config configs/cola.yaml
#     launch/torchrun.sh hostfiles/cluster --nnodes 1:2 --max-restarts 3 ...    # elastic: goes on with one of two hosts
#     launch/torchrun.sh hostfiles/cluster --export HF_TOKEN ...                # variables that are to be set everywhere
#     launch/torchrun.sh hostfiles/cluster --dry-run ...                        # only prints the commands
#
# Looks at every host first. Ends with the job's exit code and its message, and leaves nothing running anywhere.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" "$root/dtrain/commands/launch.py" torchrun "$@"
