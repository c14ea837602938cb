#!/bin/bash
# Runs a command on hosts of their own, one rank on each, with the environment that torch.distributed reads:
#
#     tests/hosts.sh 4 1000 python train.py     4 hosts, cables of 1,000 Mbit/s each way (0: as fast as they go)
#
# The hosts are network namespaces around one switch. No privileges are needed; they vanish with this script. Host R has the address
# 10.0.0.(R + 1), and its end of the cable is eth0. Needs util-linux and iproute2.
set -e
if [ -z "$APART" ]; then
    APART=1 exec unshare --user --map-root-user --net --mount --pid --fork --kill-child "$0" "$@"
fi
hosts=$1 mbit=$2
shift 2
mount -t tmpfs tmpfs /run
ip link add switch type bridge
ip link set switch up
for ((rank = 0; rank < hosts; rank++)); do
    ip netns add host$rank
    ip -n host$rank link set lo up
    ip link add port$rank type veth peer name eth0 netns host$rank
    ip link set port$rank master switch up
    ip -n host$rank address add 10.0.0.$((rank + 1))/24 dev eth0
    ip -n host$rank link set eth0 up
    if ((mbit)); then
        tc -n host$rank qdisc add dev eth0 root tbf rate ${mbit}mbit burst 1mb latency 20ms
    fi
done
export WORLD_SIZE=$hosts MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 GLOO_SOCKET_IFNAME=eth0
for ((rank = 0; rank < hosts; rank++)); do
    RANK=$rank LOCAL_RANK=$rank ip netns exec host$rank "$@" &
    ranks+=($!)
done
failed=0
for process in "${ranks[@]}"; do
    wait $process || failed=1
done
exit $failed
