# What deploy/run --install and --uninstall do: a node for a cluster. Sourced by deploy/run, which
# has the paths. By package on Debian and Ubuntu, elsewhere by copying files to where deploy/run has
# them too.

PACKAGED=/usr/bin
CONFIG=/etc/gantry/config.toml
MODULES=/etc/modules-load.d/gantry.conf
SYSCTLS=/etc/sysctl.d/60-gantry.conf
PROFILE=/etc/apparmor.d/gantry-default
# What was put where, as sha256sum has it: by that a file of an earlier version, which the next one
# replaces, is told from one that somebody has changed, which stays.
SUMS=/usr/local/share/gantry/installed.sha256

# What dpkg knows of the package gantry: installed, config-files, nothing.
package_state() { ! have dpkg-query || dpkg-query -W -f '${db:Status-Status}' gantry 2>/dev/null || true; }

# Whether there is a package, also one that an upgrade has left half way.
is_packaged() {
    case $(package_state) in '' | not-installed | config-files) return 1 ;; esac
}

# Refuses a file that is no package of ours, for this machine.
check_package() {
    local name architecture
    [ -r "$1" ] || die "--package: cannot read $1"
    name=$(dpkg-deb -f "$1" Package 2>/dev/null) || die "--package: $1 is not a Debian package"
    [ "$name" = gantry ] || die "--package: $1 is the package $name, not gantry"
    architecture=$(dpkg-deb -f "$1" Architecture)
    [ "$architecture" = "$(dpkg --print-architecture)" ] || die "--package: $1 is for $architecture"
}

install_package() {
    local package options
    package=$(realpath "$1")
    say "installing $(dpkg-deb -f "$package" Package Version | paste -sd ' ')"
    export DEBIAN_FRONTEND=noninteractive
    # Configuration that was changed is kept, without a question. --reinstall: the same version may
    # have been built anew.
    # --no-remove: what stands in its way, as another runtime's package of runc may, is for people.
    options=(-q -y --reinstall --allow-downgrades --no-remove -o Dpkg::Use-Pty=0
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold)
    apt-get install "${options[@]}" "$package" && return
    # What it depends on may have to be fetched, by package lists that are absent or stale.
    apt-get update -qq
    apt-get install "${options[@]}" "$package"
}

# What deploy/run has put into /usr/local makes way for the package: its unit goes before the
# package's. Pods do not notice.
replace_files() {
    [ -e "$UNIT" ] || [ -e "$DAEMON" ] || return 0
    say "the package takes the place of $DAEMON; pods run on"
    if untouched "$UNIT"; then
        remove_put "$UNIT"
    elif [ -e "$UNIT" ]; then
        mv "$UNIT" "$UNIT.old"
        forget "$UNIT"
        say "kept $UNIT.old: it was changed"
    fi
    # The package has them in /usr/lib, where those would hide them.
    remove_put "$MODULES"
    remove_put "$SYSCTLS"
    hand_over "$CONFIG"
    hand_over "$PROFILE"
    [ "$TAKEN" = no ] || apparmor_parser --replace "$PROFILE"
    systemctl daemon-reload
    # The link that enables it leads to the file that is gone.
    systemctl reenable --quiet gantry.service
    systemctl restart gantry.service
    rm -f "$DAEMON" "$CTL" "$BIN/gantry-shim"
    [ ! -e "$CONFLIST" ] || say "kept $CONFLIST: remove it when the cluster brings a network of its own"
}

# Leaves the configuration file $1 to the package. One of an earlier version dpkg takes for changed and
# keeps, with the package's beside it. TAKEN: whether the package's took its place, as it does where
# nobody has changed it.
hand_over() {
    TAKEN=no
    if [ -e "$1.dpkg-dist" ] && untouched "$1"; then
        mv "$1.dpkg-dist" "$1"
        TAKEN=yes
    fi
    forget "$1"
}

# Whether $1 is still what was put there, by whichever version.
untouched() { [ -e "$1" ] && grep -sF "  $1" "$SUMS" | sha256sum --check --status 2>/dev/null; }

# Writes standard input to $1, unless somebody has changed what is there. PUT: whether it was written.
put() {
    local new
    PUT=no
    new=$(mktemp)
    cat >"$new"
    if [ -e "$1" ] && ! cmp -s "$new" "$1" && ! untouched "$1"; then
        say "kept $1: it was changed"
    else
        if ! cmp -s "$new" "$1"; then
            install -D -m 644 "$new" "$1"
            PUT=yes
        fi
        forget "$1"
        mkdir -p "${SUMS%/*}"
        sha256sum "$1" >>"$SUMS"
    fi
    rm "$new"
}

# Removes $1 if it was put there and is as it was. REMOVED: whether it is gone.
remove_put() {
    REMOVED=no
    [ -e "$1" ] || { forget "$1"; return 0; }
    if untouched "$1"; then
        rm "$1"
        forget "$1"
        REMOVED=yes
    else
        say "kept $1: it was changed"
    fi
}

forget() {
    [ -e "$SUMS" ] || return 0
    sed -i "\|  $1\$|d" "$SUMS"
    [ -s "$SUMS" ] || { rm "$SUMS"; rmdir --ignore-fail-on-non-empty "${SUMS%/*}"; }
}

install_files() {
    local failed=""
    if [ -n "${GANTRY_BIN:-}" ]; then
        install_programs "$GANTRY_BIN"/{gantryd,gantryctl,gantry-shim} "$BIN"
    else
        ensure_rust
        build_release "$BIN"
    fi
    mkdir -p "${CONFIG%/*}"/{conf.d,certs.d}
    put "$CONFIG" <"$REPO/deploy/config.toml"
    put "$MODULES" <"$REPO/deploy/modules.conf"
    put "$SYSCTLS" <"$REPO/deploy/sysctl.conf"
    if have aa-enabled && aa-enabled --quiet; then
        put "$PROFILE" <"$REPO/deploy/apparmor/gantry-default"
        apparmor_parser --replace "$PROFILE"
    fi
    # As the package does: of the machine's sysctls those that pods need, and no others. Also when one
    # module, of whoever, does not load.
    systemctl restart systemd-modules-load.service || failed=yes
    /usr/lib/systemd/systemd-sysctl --prefix=/net/ipv4/ip_forward --prefix=/net/bridge || failed=yes
    [ -z "$failed" ] ||
        say "modules or sysctls of pods could not be set: see systemctl status systemd-modules-load, sysctl --system"
    start_daemon
}

# One line for each thing that a node for pods needs: 'ok', or 'look' with what to do.
check_node() {
    local runtime found="" profile
    say "this node"
    if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; then
        echo "ok    cgroup v2, systemd driver"
    else
        echo "look  cgroup v1: gantry works with it, kubelets of today do not (failCgroupV1)"
    fi
    for runtime in runc crun; do
        if have $runtime; then echo "ok    $($runtime --version | head -n 1)"; found=yes; fi
    done
    [ -n "$found" ] || echo "look  neither runc nor crun is here: no container can run"
    if grep -qw overlay /proc/filesystems; then
        echo "ok    overlayfs"
    else
        echo "look  the kernel has no overlayfs: set images.snapshotter to native"
    fi
    if [ -e /proc/sys/net/bridge/bridge-nf-call-iptables ]; then
        echo "ok    br_netfilter"
    else
        echo "look  the module br_netfilter is not loaded: services may not work between pods of one node"
    fi
    if [ "$(cat /proc/sys/net/ipv4/ip_forward)" = 1 ]; then
        echo "ok    net.ipv4.ip_forward"
    else
        echo "look  net.ipv4.ip_forward is 0: pods reach nobody"
    fi
    if [ "$(wc -l </proc/swaps)" -gt 1 ]; then
        echo "look  swap is on: a kubelet needs failSwapOn: false, or swapoff"
    else
        echo "ok    no swap"
    fi
    if cni_bin_dir >/dev/null; then
        echo "ok    CNI plugins in $(cni_bin_dir)"
    else
        echo "look  no CNI plugins in /opt/cni/bin or /usr/lib/cni; the cluster's network may bring its own"
    fi
    if compgen -G "$CNI_CONF/*.conf" >/dev/null || compgen -G "$CNI_CONF/*.conflist" >/dev/null; then
        echo "ok    CNI configuration in $CNI_CONF"
    else
        echo "look  no CNI configuration in $CNI_CONF: the node is not ready until the cluster brings one"
    fi
    if have aa-enabled && aa-enabled --quiet; then
        profile=$(grep -c '^gantry-default ' /sys/kernel/security/apparmor/profiles || true)
        if [ "$profile" -gt 0 ]; then
            echo "ok    AppArmor, with the profile gantry-default"
        else
            echo "look  the AppArmor profile gantry-default is not loaded: RuntimeDefault means none"
        fi
    fi
}

print_kubelet() {
    cat <<END

gantry.service is up on unix://$SOCKET, now and after each boot. The kubelet of this node:

  --container-runtime-endpoint=unix://$SOCKET     or containerRuntimeEndpoint of its configuration
  --runtime-cgroups=/system.slice/gantry.service
  cgroupDriver: systemd                            needed before Kubernetes 1.28; since then gantry tells it
  kubeadm: --cri-socket unix://$SOCKET

Configuration: ${CONFIG%/*}/conf.d/NAME.toml with what differs from $CONFIG, which upgrades may
replace; then: systemctl restart gantry. Upgrades and removal: docs/operations.md.
END
}

# Where gantryd is told to serve CRI, as it reads its configuration: a file of conf.d is stronger.
configured_socket() {
    awk -F "[\"']" 'FNR == 1 { top = 1 } /^ *\[/ { top = 0 } top && /^ *socket *=/ { socket = $2 } END { print socket }' \
        $(compgen -G "$CONFIG" || true) $(compgen -G "${CONFIG%/*}/conf.d/*.toml" || true) </dev/null
}

# $1: a package, or nothing to build it. $2: yes to copy files even where there is dpkg.
install_node() {
    local package=$1 files=$2
    under_systemd || die "--install: systemd does not run this machine, so nothing would start gantry at boot"
    unmask
    if is_debian && [ "$files" = no ]; then
        if [ -z "$package" ]; then package=$("$REPO/deploy/package" | tail -n 1); fi
        check_package "$package"
        install_package "$package"
        replace_files
        systemctl enable --quiet gantry.service
        systemctl start gantry.service || true
        DAEMON=$PACKAGED/gantryd CTL=$PACKAGED/gantryctl
    else
        [ -z "$package" ] || die "--package: not with --files, and not without apt-get"
        ! is_packaged || die "gantry is installed as a package: sudo deploy/run --uninstall goes before"
        install_files
    fi
    if ! systemctl is-active --quiet gantry.service; then
        journalctl -u gantry -n 20 --no-pager >&2
        die "gantry.service does not start"
    fi
    check_node
    SOCKET=$(configured_socket)
    SOCKET=${SOCKET:-$STATE/gantry.sock}
    print_kubelet
}

# Stops the daemon and takes away what --install has brought; pods run on. $1: yes also for
# configuration and data, if no pods are left.
uninstall_node() {
    local purge=$1
    if is_packaged; then
        if [ "$purge" = yes ]; then dpkg --purge gantry; else dpkg --remove gantry; fi
        return
    fi
    if [ ! -f "$UNIT" ] && [ ! -e "$DAEMON" ] && [ "$purge" = no ]; then say "gantry is not installed"; return; fi
    uninstall_files "$purge"
    # What a package has left that was removed and not purged.
    if [ "$purge" = yes ] && [ "$(package_state)" = config-files ]; then dpkg --purge gantry; fi
}

uninstall_files() {
    local purge=$1 pods
    ! under_systemd || [ ! -e "$UNIT" ] || systemctl disable --quiet --now gantry.service
    remove_unit
    rm -f "$DAEMON" "$CTL" "$BIN/gantry-shim"
    remove_put "$MODULES"
    remove_put "$SYSCTLS"
    remove_put "$PROFILE"
    pods=$(compgen -G "$STATE/pods/*" | wc -l || true)
    if [ "$pods" -gt 0 ]; then say "$pods pods are left, and what runs in them runs on without the daemon"; fi
    [ "$purge" = yes ] || return 0
    remove_put "$CONFIG"
    remove_data
}
