#!/bin/busybox sh
# First process of the machine: has the outer file system as root, read-only under an overlay in
# memory, and goes on in it with the program that the kernel's command line names.
/bin/busybox --install -s /bin
stop() { echo "machine: $1"; poweroff -f; }
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev || stop "no basic mounts"
while read -r module; do insmod "/lib/$module" || stop "cannot load $module"; done < /modules
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro outer /outer || stop "cannot mount the outer file system"
mount -t tmpfs -o size=75% over /over && mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/outer,upperdir=/over/upper,workdir=/over/work root /root || stop "cannot lay the overlay"
for kind in proc:proc sysfs:sys devtmpfs:dev tmpfs:run bpf:sys/fs/bpf cgroup2:sys/fs/cgroup; do
    mount -t "${kind%%:*}" none "/root/${kind#*:}" || stop "cannot mount ${kind%%:*}"
done
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts none /root/dev/pts && mount -t tmpfs none /root/dev/shm || stop "cannot mount below /dev"
for word in $(cat /proc/cmdline); do case $word in next=*) next=${word#next=};; esac; done
exec switch_root /root "$next"
