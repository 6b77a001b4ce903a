#!/usr/bin/env bash
# Stops Ray on every machine of provider `local`; run it on the head, before `ray down`, which stops the head alone.
set -euo pipefail

# Here first: the head's autoscaler would start Ray again on machines that it misses.
ray stop

list='import os, yaml
config = yaml.safe_load(open(os.path.expanduser("~/ray_bootstrap_config.yaml")))
for address in config["provider"]["worker_ips"]: print(config["auth"]["ssh_user"] + "@" + address)'

status=0
for machine in $(python -c "$list"); do
  # -n: ssh must not read the list. `bash -i` reads ~/.bashrc, where Ray is on the path.
  ssh -n -i ~/ray_bootstrap_key.pem -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
    -o ConnectTimeout=5 "$machine" 'bash -ic "ray stop" 2>/dev/null' || { echo "cannot stop Ray on $machine" >&2; status=1; }
done
exit "$status"
