#!/usr/bin/env bash
# on-node.sh ray start ...: what every node of a Tandem cluster needs around `ray start`. The launcher files call it.
set -euo pipefail

# Sockets and shared memory take file descriptors: as many as the system lets us have.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -H -n)"
# Ray's launcher sets it to 1, and all that Ray starts would inherit it: workers choose their threads themselves.
unset OMP_NUM_THREADS
# Of provider `local`, Ray 2.60's second autoscaler lost a worker; Tandem is proven with the first one.
export RAY_enable_autoscaler_v2=0

# Fixed ports, so that a firewall can name them; docs/cluster.md lists all of them.
exec "$@" --object-manager-port=8076 --node-manager-port=8077 --metrics-export-port=8078 \
  --dashboard-agent-grpc-port=8079 --runtime-env-agent-port=8080 --disable-usage-stats
