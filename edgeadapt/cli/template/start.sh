#!/bin/sh
# The rounds of the fleet in this folder: an agent for each device, and the coordinator. Ctrl-C ends them all.
cd "$(dirname "$0")" || exit
edgeadapt() { {python} -P -m edgeadapt "$@"; }
agents=
trap 'kill $agents 2> /dev/null' EXIT
trap 'exit 130' INT TERM
for device in devices/*/; do
  {python} -P -m edgeadapt device run --state "$device" 2> "${device%/}.log" &
  agents="$agents $!"
done
edgeadapt coordinator run coordinator --gateway 127.0.0.1:{port} &&
  edgeadapt audit verify coordinator --authority authority/authority.pem
