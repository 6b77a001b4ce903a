#!/usr/bin/env bash
# The Debian packages that the cluster tests need: installed if this is root, else named.
set -euo pipefail

declare -A package=(
  [ip]=iproute2 [sshd]=openssh-server [ssh]=openssh-client [rsync]=rsync [nsenter]=util-linux [setpriv]=util-linux
)
missing=()
for program in "${!package[@]}"; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("${package[$program]}")
done

if [ "$(id -u)" != 0 ]; then
  echo "the cluster tests make network namespaces: run them as root${missing:+, after: apt-get install ${missing[*]}}" >&2
  exit 1
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing ${missing[*]} ..."
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
