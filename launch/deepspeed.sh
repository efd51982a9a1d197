#!/usr/bin/env bash
# Runs dtrain on the hosts of a hostfile, with DeepSpeed's launcher on each of them, started over ssh.
#
#     launch/deepspeed.sh hostfiles/cluster --config configs/cola.yaml engine.zero_stage=2
#     launch/deepspeed.sh hostfiles/cluster --exclude node2 ...        # DeepSpeed's filters of hosts and slots
#     launch/deepspeed.sh hostfiles/cluster --export HF_TOKEN ...      # variables that are to be set everywhere
#     launch/deepspeed.sh hostfiles/cluster --dry-run ...              # only prints the commands
#
# Looks at every host first. Ends with the job's exit code and its message, and leaves nothing running anywhere.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" "$root/dtrain/commands/launch.py" deepspeed "$@"
