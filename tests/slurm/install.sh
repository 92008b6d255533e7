#!/usr/bin/env bash
# Install Debian's SLURM and munge for the tests on a cluster (with `accounting`, also SLURM's database), if they are
# missing and this is root. Starts no daemon.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
programs="munged slurmctld slurmd sbatch" packages="slurm-wlm munge" missing=0
if [ "${1:-}" = accounting ]; then
  programs="$programs slurmdbd mariadbd" packages="$packages slurmdbd mariadb-server"
fi
for program in $programs; do command -v "$program" > /dev/null || missing=1; done
if [ "$missing" = 0 ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "SLURM is not installed: the tests on a cluster are skipped. As root: apt-get install $packages" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d.posttrain  # so that installing a package starts no daemon
chmod +x /usr/sbin/policy-rc.d.posttrain
if [ ! -e /usr/sbin/policy-rc.d ]; then
  mv /usr/sbin/policy-rc.d.posttrain /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
else
  rm /usr/sbin/policy-rc.d.posttrain
fi
apt-get update -qq
apt-get install -qq --yes --no-install-recommends $packages > /dev/null
