#!/bin/sh
# Makes a device of a stock Linux with systemd, without a network: run once as root, from where `regrow image` put it. Running it again
# goes on where it was interrupted.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
prefix=/opt/regrow
settings=/etc/regrow

fail() { echo "regrow install: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "run it as root"
command -v systemctl >/dev/null || fail "this system has no systemd"
command -v python3 >/dev/null || fail "this system has no python3"
[ "$(getconf LONG_BIT)" = 64 ] || fail "this is a 32-bit system; NumPy and onnxruntime need a 64-bit one, which every board since the Pi 3 runs"
. "$here/device.env"
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ -z "$REGROW_PYTHON" ] || [ "$version" = "$REGROW_PYTHON" ] || fail "the wheels here are for Python $REGROW_PYTHON, this system has $version: make the image for that one, with --os (regrow image pi) or --python (regrow image generic)"

# As in docs/updates.md: one environment of two, and links. What a power cut interrupted is made anew.
if [ ! -e "$prefix/bin" ]; then
    rm -rf "$prefix"
    mkdir -p "$prefix/wheels"
    python3 -m venv --without-pip "$prefix/a"
    PYTHONPATH=$(echo "$here"/wheels/pip-*.whl) "$prefix/a/bin/python" -m pip --quiet --disable-pip-version-check --no-cache-dir \
        install --no-index --find-links "$here/wheels" "regrow[fleet]" || fail "the wheels could not be installed"
    "$prefix/a/bin/regrow" --version || fail "regrow does not run here"
    cp "$here"/wheels/*.whl "$prefix/wheels/"
    ln -s a "$prefix/current"
    ln -s a "$prefix/good"
    sync
    ln -s current/bin "$prefix/bin"
fi

install -d -m 755 "$settings" /srv/regrow
install -m 644 "$here/agent.env" "$settings/agent.env"
install -m 644 "$here/update.json" "$settings/update.json"
for data in "$here"/data/*; do
    [ ! -e "$data" ] || install -m 644 "$data" /srv/regrow/
done
# The claim lets this device ask for its certificate once; it does not stay where any card reader finds it.
if [ -f "$here/claim.json" ]; then
    install -m 600 "$here/claim.json" "$settings/claim.json"
    sync
    rm -f "$here/claim.json"
fi
for unit in "$here"/units/*; do
    install -m 644 "$unit" /etc/systemd/system/
done
install -d -m 755 /etc/systemd/system/regrow-agent.service.d
install -m 644 "$here/regrow-agent-identity.conf" /etc/systemd/system/regrow-agent.service.d/identity.conf
install -m 644 "$here/journald@regrow.conf" /etc/systemd/
install -m 755 "$here/wifi.sh" "$prefix/wifi.sh"
# Name look-ups need no port that answers the neighbours (LLMNR).
if [ -d /etc/systemd/resolved.conf.d ] || systemctl cat systemd-resolved >/dev/null 2>&1; then
    install -d -m 755 /etc/systemd/resolved.conf.d
    printf '[Resolve]\nLLMNR=no\n' >/etc/systemd/resolved.conf.d/regrow.conf
    [ ! -d /run/systemd/system ] || systemctl try-restart --no-block systemd-resolved
fi
# The clock of a board without a battery: the internet's, or the gateway's where there is none.
if systemctl cat systemd-timesyncd >/dev/null 2>&1; then
    install -d -m 755 /etc/systemd/timesyncd.conf.d
    install -m 644 "$here/timesyncd.conf" /etc/systemd/timesyncd.conf.d/regrow.conf
    [ ! -d /run/systemd/system ] || systemctl try-restart --no-block systemd-timesyncd
fi
sync
systemctl daemon-reload
for unit in "$here"/units/*; do
    name=$(basename "$unit")
    if grep -q '^\[Install\]' "$unit"; then
        systemctl enable "$name"
        # Not waited for: at a first boot the agent starts when the network is there.
        [ ! -d /run/systemd/system ] || systemctl start --no-block "$name"
    fi
done
: >"$settings/installed" # until it is there, every boot runs this again
sync
echo "regrow install: this is device $REGROW_DEVICE"
