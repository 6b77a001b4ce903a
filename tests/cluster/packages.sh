#!/usr/bin/env bash
# What the cluster tests need of the machine: root, and Debian's packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

status=0
./packages.sh ip=iproute2 sshd=openssh-server ssh=openssh-client rsync=rsync nsenter=util-linux setpriv=util-linux || status=$?
if [ "$(id -u)" != 0 ]; then
  echo "the cluster tests make network namespaces: run them as root" >&2
  exit 1
fi
exit "$status"
