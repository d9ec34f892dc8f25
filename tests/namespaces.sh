# Shell functions that tests/bench/run and tests/conformance/run share: namespaces and cgroups for
# everything that they start. Sourced, never run. Expects: bash, set -euo pipefail, WORK (a
# directory of the run's own) and CGROUP (a name that nothing else on the machine has).

# Prints "path type options" of each mounted cgroup hierarchy.
hierarchies() { awk '$3 ~ /^cgroup2?$/ { print $2, $3, $4 }' /proc/self/mounts; }

# Puts this process into a cgroup of our own in every hierarchy.
enter_cgroups() {
    local path type rest dir
    while read -r path type rest; do
        dir=$path/$CGROUP
        mkdir -p "$dir" || return 1
        # A new v1 cpuset is empty, and nothing can run in an empty one.
        if [ "$type" = cgroup ] && [ -e "$dir/cpuset.cpus" ]; then
            cat "$path/cpuset.cpus" >"$dir/cpuset.cpus" || return 1
            cat "$path/cpuset.mems" >"$dir/cpuset.mems" || return 1
        fi
        echo "$BASHPID" >"$dir/cgroup.procs" || return 1
    done < <(hierarchies)
}

remove_cgroups() {
    local path type rest i
    while read -r path type rest; do
        for i in $(seq 50); do
            [ -d "$path/$CGROUP" ] || break
            find "$path/$CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null && break
            sleep 0.1
        done
    done < <(hierarchies)
}

# Runs a command in namespaces and cgroups of its own and returns its exit status.
in_namespaces() {
    local status=0
    (
        enter_cgroups || exit 1
        exec unshare --net --mount --propagation private --ipc --uts --pid --cgroup --fork --kill-child -- "$@"
    ) </dev/null &
    NAMESPACES=$!
    # Not in the foreground: a signal must reach the caller's trap while the namespaces live.
    wait "$NAMESPACES" || status=$?
    NAMESPACES=""
    return "$status"
}

# Ends every process of an in_namespaces that a signal has cut short.
NAMESPACES=""
end_namespaces() {
    [ -n "$NAMESPACES" ] || return 0
    kill -KILL "$NAMESPACES" 2>/dev/null || true
    wait "$NAMESPACES" 2>/dev/null || true
}

# Inside new network, mount, PID, IPC, UTS and cgroup namespaces: mounts what belongs to them.
mount_private() {
    local path type rest list=$WORK/hierarchies new=$WORK/sys
    hierarchies >"$list"
    mount -t proc proc /proc
    mkdir "$new"
    mount -t sysfs sysfs "$new"
    if [ "$(wc -l <"$list")" -gt 1 ]; then mount -t tmpfs -o mode=755 tmpfs "$new/fs/cgroup"; fi
    while read -r path type rest; do
        mkdir -p "$new/fs/cgroup${path#/sys/fs/cgroup}"
        # The controllers of a v1 hierarchy are among its mount options.
        rest=$(tr , '\n' <<<"$rest" | grep -vE '^(rw|ro|nosuid|nodev|noexec|relatime|seclabel|nsdelegate|memory_.*)$' | paste -sd, || true)
        mount -t "$type" ${rest:+-o "$rest"} "$type" "$new/fs/cgroup${path#/sys/fs/cgroup}"
    done <"$list"
    umount -R -l /sys
    mount --move "$new" /sys
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p /run/lock
    # host-local keeps its leases here; absent on a fresh machine.
    mkdir -p /var/lib/cni
    mount -t tmpfs tmpfs /var/lib/cni
    # Mounts of a pod must reach its container, as on a machine under systemd.
    mount --make-rshared /
    hostname "$CGROUP"
    ip link set lo up
    echo 1 >/proc/sys/net/ipv4/ip_forward
    # cgroup v2: only a cgroup without processes can hand controllers down.
    if [ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]; then
        mkdir /sys/fs/cgroup/init
        while read -r pid; do echo "$pid" >/sys/fs/cgroup/init/cgroup.procs || true; done </sys/fs/cgroup/cgroup.procs
        sed 's/\([a-z_]\+\)/+\1/g' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
    fi
}

# Inside, after mount_private: crun of Debian 12 refuses a machine that has a v2 hierarchy beside
# those of v1.
suit_cgroups_to() {
    if [[ $("$1" --version | head -n 1) = crun* ]] && mountpoint -q /sys/fs/cgroup/unified; then
        umount /sys/fs/cgroup/unified
    fi
}
