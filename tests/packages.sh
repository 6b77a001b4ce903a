#!/usr/bin/env bash
# tests/packages.sh PROGRAM=PACKAGE ...: the Debian packages of programs that are not there are installed if this is root,
# else named.
set -euo pipefail

missing=()
for each in "$@"; do
  PATH=$PATH:/usr/sbin:/sbin command -v "${each%%=*}" >/dev/null || missing+=("${each#*=}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
  echo "these tests need: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "installing ${missing[*]} ..."
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
