#!/bin/sh
# Makes a Pi the gateway of a fleet, indoors or out: run once as root, from where `regrow image gateway` put it. Running it again goes on
# where it was interrupted. The fleet's keys are made here, on this board; nothing secret came with the image but the access point's key.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
prefix=/opt/regrow
settings=/etc/regrow
state=/var/lib/regrow

fail() { echo "regrow install: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "run it as root"
. "$here/gateway.conf"
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$version" = "$REGROW_PYTHON" ] || fail "the wheels here are for Python $REGROW_PYTHON, this system has $version: make the image with another --os"

# Packages of the system: from the card where they are there, else from the internet.
export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"; }
dpkg --configure -a || true # what a power cut interrupted; where another program holds the lock, apt waits for it
if ls "$here"/debs/*.deb >/dev/null 2>&1; then
    apt install --no-install-recommends "$here"/debs/*.deb || fail "the packages in debs/ do not suffice"
elif ! command -v mosquitto >/dev/null || ! command -v chronyd >/dev/null || ! command -v fake-hwclock >/dev/null; then
    { apt update && apt install --no-install-recommends mosquitto chrony fake-hwclock; } ||
        fail "mosquitto, chrony and fake-hwclock are missing: connect this board to the internet and restart it, or put their .deb files into regrow/debs"
fi
# The gateway starts a mosquitto of its own, with the fleet's certificates.
systemctl disable --now mosquitto 2>/dev/null || true

# The data belong on an SSD: SD cards wear out under a log. It is named by its label and never formatted here.
id regrow >/dev/null 2>&1 || useradd --system --home-dir "$state" --shell /usr/sbin/nologin regrow
mkdir -p "$state"
if [ -n "$REGROW_SSD" ]; then
    device="/dev/disk/by-label/$REGROW_SSD"
    check=systemd-fsck@$(systemd-escape --path "$device").service
    # A unit, not fstab: without its SSD the board still comes up, so that somebody can log in, and the gateway alone stays down.
    cat >/etc/systemd/system/var-lib-regrow.mount <<EOF
[Unit]
Description=Data of the Regrow gateway
Wants=$check
After=$check

[Mount]
What=$device
Where=$state
Type=ext4
Options=noatime

[Install]
WantedBy=multi-user.target
EOF
    mkdir -p /etc/systemd/system/regrow-gateway.service.d
    printf '[Unit]\nRequiresMountsFor=%s\nAssertPathIsMountPoint=%s\n' "$state" "$state" \
        >/etc/systemd/system/regrow-gateway.service.d/ssd.conf
    systemctl daemon-reload
    systemctl enable --now var-lib-regrow.mount ||
        fail "no file system with the label $REGROW_SSD: connect the SSD, make one with mkfs.ext4 -L $REGROW_SSD, restart"
fi
chown regrow:regrow "$state"
chmod 700 "$state"

if [ ! -e "$prefix/bin" ]; then
    rm -rf "$prefix"
    mkdir -p "$prefix"
    python3 -m venv --without-pip "$prefix/a"
    PYTHONPATH=$(echo "$here"/wheels/pip-*.whl) "$prefix/a/bin/python" -m pip --quiet --disable-pip-version-check --no-cache-dir \
        install --no-index --find-links "$here/wheels" "regrow[server,fleet]" || fail "the wheels could not be installed"
    "$prefix/a/bin/regrow" --version || fail "regrow does not run here"
    ln -s a "$prefix/current"
    sync
    ln -s current/bin "$prefix/bin"
fi

# The access point, its DHCP server, and the name under which devices find the gateway.
if [ -f "$here/access-point.nmconnection" ]; then
    install -m 600 "$here/access-point.nmconnection" /etc/NetworkManager/system-connections/regrow-access-point.nmconnection
    install -d -m 755 /etc/NetworkManager/dnsmasq-shared.d
    install -m 644 "$here/dnsmasq.conf" /etc/NetworkManager/dnsmasq-shared.d/regrow.conf
    [ -z "$REGROW_COUNTRY" ] || ! command -v raspi-config >/dev/null || raspi-config nonint do_wifi_country "$REGROW_COUNTRY"
    [ ! -d /run/systemd/system ] || ! command -v nmcli >/dev/null || nmcli connection reload || true
fi
# Name look-ups need no port that answers the neighbours (LLMNR).
if systemctl cat systemd-resolved >/dev/null 2>&1; then
    install -d -m 755 /etc/systemd/resolved.conf.d
    printf '[Resolve]\nLLMNR=no\n' >/etc/systemd/resolved.conf.d/regrow.conf
    systemctl try-restart --no-block systemd-resolved
fi
# The fleet's clock: devices have none that survives a power cut. This board's own goes on from where fake-hwclock kept it.
install -d -m 755 /etc/chrony/conf.d
install -m 644 "$here/chrony.conf" /etc/chrony/conf.d/regrow.conf
systemctl enable chrony
[ ! -d /run/systemd/system ] || systemctl restart --no-block chrony

run_as_regrow() { setpriv --reuid regrow --regid regrow --clear-groups --no-new-privs env HOME="$state" "$@"; }
if [ -d "$here/task" ] && [ ! -d "$state/tasks/$REGROW_TASK_NAME" ]; then
    mkdir -p "$state/tasks"
    cp -r "$here/task" "$state/tasks/.$REGROW_TASK_NAME"
    chown -R regrow:regrow "$state/tasks"
    mv "$state/tasks/.$REGROW_TASK_NAME" "$state/tasks/$REGROW_TASK_NAME"
fi
# Made aside, so that no power cut leaves half of its keys.
home="$state/runs/.gateway"
if [ ! -d "$home/fleet" ]; then
    rm -rf "$home/.fleet"
    # shellcheck disable=SC2086 # several words
    (cd "$state" && run_as_regrow "$prefix/bin/regrow" fleet init "$REGROW_FLEET" --fleet "$home/.fleet" $REGROW_HOSTS) >/dev/null
    sync
    mv "$home/.fleet" "$home/fleet"
fi

install -d -m 755 "$settings"
install -m 644 "$here/journald@regrow.conf" /etc/systemd/
install -m 644 "$here/gateway.env" "$settings/gateway.env"
for unit in "$here"/units/*; do
    install -m 644 "$unit" /etc/systemd/system/
done
sync
systemctl daemon-reload
for unit in "$here"/units/*; do
    if grep -q '^\[Install\]' "$unit"; then
        systemctl enable "$(basename "$unit")"
        [ ! -d /run/systemd/system ] || systemctl start --no-block "$(basename "$unit")"
    fi
done
: >"$settings/installed" # until it is there, every boot runs this again
sync
echo "regrow install: this is the gateway of $REGROW_FLEET"
