#!/bin/sh
# Makes a flashed Jetson a device: run once as root, from where `regrow image jetson` put it. The container is built on the board.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
fail() { echo "regrow install: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "run it as root"
command -v docker >/dev/null || fail "this system has no docker; JetPack's nvidia-container package brings it"
docker info --format '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}' | grep -qw nvidia || fail "docker has no nvidia runtime: install nvidia-container-toolkit, then nvidia-ctk runtime configure --runtime=docker"
. "$here/device.env"
hostnamectl set-hostname "$REGROW_DEVICE"
docker build --tag regrow-agent --build-arg "BASE=$REGROW_BASE" "$here"
install -d -m 755 /etc/regrow /srv/regrow
install -d -m 700 -o 10001 -g 10001 /var/lib/regrow-agent
install -m 644 "$here/agent.env" /etc/regrow/agent.env
for data in "$here"/data/*; do
    [ ! -e "$data" ] || install -m 644 "$data" /srv/regrow/
done
if [ -f "$here/claim.json" ]; then
    install -m 600 -o 10001 -g 10001 "$here/claim.json" /etc/regrow/claim.json
    sync
    rm -f "$here/claim.json"
fi
# The clock of a board without a battery: the internet's, or the gateway's where there is none.
if systemctl cat systemd-timesyncd >/dev/null 2>&1; then
    install -d -m 755 /etc/systemd/timesyncd.conf.d
    install -m 644 "$here/timesyncd.conf" /etc/systemd/timesyncd.conf.d/regrow.conf
    [ ! -d /run/systemd/system ] || systemctl try-restart --no-block systemd-timesyncd
fi
install -m 644 "$here/regrow-agent-jetson.service" /etc/systemd/system/
systemctl daemon-reload
systemctl enable --now regrow-agent-jetson
echo "regrow install: this is device $REGROW_DEVICE"
