#!/bin/sh
# Runs a Windows program in the chroot ROOT, within name spaces of its own: what is mounted and started ends with it.
# Usage: enter.sh ROOT MODEL-DIRECTORY WORK-DIRECTORY PROGRAM ...
set -e
root=$1 model=$2 work=$3
shift 3
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/mnt"
mkdir "$root/mnt/model" "$root/mnt/work"
mount --bind "$model" "$root/mnt/model"
mount --bind "$work" "$root/mnt/work"
[ ! -e "$work/genai_config.json" ] || mount --bind "$work/genai_config.json" "$root/mnt/model/genai_config.json"
exec chroot "$root" env -i PATH=/usr/bin:/bin HOME=/root WINEPREFIX=/root/prefix WINEDEBUG=-all \
  WINEDLLOVERRIDES="mscoree,mshtml,winedbg.exe=" VKD3D_SHADER_CACHE_PATH=0 DISPLAY=:0 XDG_RUNTIME_DIR=/tmp \
  sh -c 'Xvfb :0 -nolisten tcp >/dev/null 2>&1 & until [ -S /tmp/.X11-unix/X0 ]; do sleep 0.1; done; cd /opt/directml; exec timeout 3000 /usr/lib/wine/wine64 "$@"' sh "$@"
