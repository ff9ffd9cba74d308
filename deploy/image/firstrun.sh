#!/bin/bash
# The first boot of a Raspberry Pi OS that reads no cloud-init: systemd.run in cmdline.txt starts it once, then the Pi restarts.
set +e
for boot in /boot/firmware /boot; do
    [ -f "$boot/regrow/device.env" ] && break
done
exec >>"$boot/regrow/firstrun.log" 2>&1
# Whatever comes, it runs once.
sed -i 's| systemd\.run.*||' "$boot/cmdline.txt"
. "$boot/regrow/device.env"

old=$(cat /etc/hostname)
echo "$REGROW_DEVICE" >/etc/hostname
sed -i "s/127\.0\.1\.1.*/127.0.1.1\t$REGROW_DEVICE/" /etc/hosts
grep -q '^127\.0\.1\.1' /etc/hosts || printf '127.0.1.1\t%s\n' "$REGROW_DEVICE" >>/etc/hosts
echo "host name: $old -> $REGROW_DEVICE"

if [ -n "$REGROW_USER" ]; then
    id "$REGROW_USER" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$REGROW_USER"
    usermod --append --groups sudo "$REGROW_USER"
    passwd --lock "$REGROW_USER"
    echo "$REGROW_USER ALL=(ALL) NOPASSWD:ALL" >/etc/sudoers.d/010_regrow
    chmod 440 /etc/sudoers.d/010_regrow
    home=$(getent passwd "$REGROW_USER" | cut -d: -f6)
    install -d -m 700 -o "$REGROW_USER" -g "$REGROW_USER" "$home/.ssh"
    install -m 600 -o "$REGROW_USER" -g "$REGROW_USER" "$boot/regrow/authorized_keys" "$home/.ssh/authorized_keys"
    printf 'PasswordAuthentication no\nPermitRootLogin no\nKbdInteractiveAuthentication no\n' >/etc/ssh/sshd_config.d/10-regrow.conf
    systemctl enable ssh
fi
# Nobody sits there to answer its questions.
systemctl disable userconfig 2>/dev/null
[ -z "$REGROW_TIMEZONE" ] || ln -sf "/usr/share/zoneinfo/$REGROW_TIMEZONE" /etc/localtime
[ -z "$REGROW_COUNTRY" ] || ! command -v raspi-config >/dev/null || raspi-config nonint do_wifi_country "$REGROW_COUNTRY"
sh "$boot/regrow/install.sh"
sh /opt/regrow/wifi.sh
sync
exit 0
