#!/usr/bin/env bash
# Runs dtrain on the hosts of a hostfile. Starts DeepSpeed's launcher on each of them over ssh.
#
#     launch/deepspeed.sh hostfiles/cluster --config configs/cola.yaml engine.zero_stage=2
#     launch/deepspeed.sh hostfiles/cluster --exclude node2 ...        # DeepSpeed's filters of hosts and slots
#     launch/deepspeed.sh hostfiles/cluster --export HF_TOKEN ...      # sets a variable on every host
#     launch/deepspeed.sh hostfiles/cluster --dry-run ...              # only prints the commands
#
# Checks every host first. Exits with the job's exit code, prints its message last, and leaves no process on any host.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" "$root/dtrain/commands/launch.py" deepspeed "$@"
