# Shell functions that deploy/run, tests/run and the scripts below tests share. Sourced, never run.
# Expects: bash, set -euo pipefail.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The oldest compiler that builds the workspace, from its Cargo.toml.
RUST_MINIMUM=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$REPO/Cargo.toml")

say() { printf '== %s\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

need_root() { [ "$(id -u)" = 0 ] || die "needs root: sudo $0"; }

have() { command -v "$1" >/dev/null 2>&1; }

is_debian() { have apt-get && have dpkg-query; }

# What apt would install, in words, for people whose distribution has other package names.
print_needs() {
    cat <<'END'
This is not Debian or Ubuntu, so nothing is installed for you. Please install:
  - Rust and Cargo, RUST_MINIMUM or newer (rustup), a C compiler and linker, pkg-config
  - runc 1.1 or newer (or crun)
  - the CNI plugins bridge, host-local, portmap and loopback in /opt/cni/bin or /usr/lib/cni
  - iptables, iproute2, util-linux
  - a static busybox (for the first image)
  - for the tests also protoc (protobuf-compiler) and, for crictl and critest, Go 1.26 or newer
END
}

# Installs those of the named packages that are not there. Asks the network only if it must.
apt_install() {
    local package missing=()
    for package; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    local options=(-qq -y --no-install-recommends -o Dpkg::Use-Pty=0)
    apt-get install "${options[@]}" "${missing[@]}" >/dev/null 2>&1 && return
    # The package lists may be absent or stale.
    apt-get update -qq
    apt-get install "${options[@]}" "${missing[@]}" >/dev/null
}

# Puts what a node needs in place: packages by the program that they bring.
ensure_node_tools() {
    local wanted=() program
    cni_bin_dir >/dev/null || wanted+=(containernetworking-plugins)
    have runc || have crun || wanted+=(runc)
    have iptables || wanted+=(iptables)
    have ip || wanted+=(iproute2)
    have setsid && have nsenter || wanted+=(util-linux)
    static_busybox >/dev/null || wanted+=(busybox-static)
    [ -s /etc/ssl/certs/ca-certificates.crt ] || wanted+=(ca-certificates)
    [ ${#wanted[@]} -gt 0 ] || return 0
    if is_debian; then
        apt_install "${wanted[@]}"
        return
    fi
    print_needs | sed "s/RUST_MINIMUM/$RUST_MINIMUM/" >&2
    for program in runc iptables ip setsid; do have "$program" || echo "missing here: $program" >&2; done
    cni_bin_dir >/dev/null || echo "missing here: CNI plugins" >&2
    static_busybox >/dev/null || echo "missing here: a static busybox" >&2
    exit 1
}

# The first directory that holds the CNI plugins.
cni_bin_dir() {
    local dir
    for dir in /opt/cni/bin /usr/lib/cni /usr/libexec/cni; do
        if [ -x "$dir/bridge" ] && [ -x "$dir/portmap" ]; then echo "$dir"; return; fi
    done
    return 1
}

# A busybox without a dynamic loader, since an image made of it holds nothing else.
static_busybox() {
    local path
    for path in /bin/busybox /usr/bin/busybox; do
        [ -x "$path" ] || continue
        if ! ldd "$path" 2>&1 | grep -q '=>'; then echo "$path"; return; fi
    done
    return 1
}

version_at_least() { printf '%s\n%s\n' "$2" "$1" | sort -VC; }

rust_version() { rustc --version 2>/dev/null | cut -d' ' -f2 | cut -d- -f1; }

# Finds cargo, also the one of the user behind sudo, or installs it. Arguments: components.
ensure_rust() {
    local home user_home="" component
    export HOME=${HOME:-/root}
    if [ -n "${SUDO_USER:-}" ]; then user_home=$(getent passwd "$SUDO_USER" | cut -d: -f6); fi
    if ! have cargo; then
        for home in "$HOME" "$user_home"; do
            [ -n "$home" ] && [ -x "$home/.cargo/bin/cargo" ] || continue
            PATH=$home/.cargo/bin:$PATH
            # Root uses the user's compiler, but keeps its downloads to itself: files of root's
            # in the user's registry would break the user's next build.
            [ "$home" = "$HOME" ] || export RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup} CARGO_HOME=${CARGO_HOME:-$HOME/.cargo}
            break
        done
    fi
    if ! have cargo || ! version_at_least "$(rust_version)" "$RUST_MINIMUM"; then
        have cargo && ! have rustup && say "Rust $(rust_version) is older than $RUST_MINIMUM"
        install_rust
    fi
    for component; do
        # rustup puts the names of all components into PATH, there or not.
        "$component" --version >/dev/null 2>&1 && continue
        case $component in cargo-clippy) component=clippy ;; cargo-fmt) component=rustfmt ;; esac
        have rustup || die "$component is missing; install it beside cargo"
        rustup component add "$component" >/dev/null 2>&1 || die "rustup could not add $component"
    done
    # The linker, also for build scripts.
    if ! have cc; then is_debian || die "a C compiler (cc) is missing"; apt_install gcc libc6-dev; fi
    set_target_dir
    mkdir -p "$CARGO_TARGET_DIR"
    export PATH CARGO_TARGET_DIR
}

# Where cargo builds. Root must not own the target directory of a user's checkout.
set_target_dir() {
    [ -z "${CARGO_TARGET_DIR:-}" ] || return 0
    CARGO_TARGET_DIR=$REPO/target
    if [ -n "${SUDO_UID:-}" ] && [ "$SUDO_UID" != 0 ]; then
        mkdir -p "$REPO/target"
        chown --reference="$REPO" "$REPO/target"
        CARGO_TARGET_DIR=$REPO/target/root
    fi
}

install_rust() {
    if ! have rustup; then
        is_debian || die "Rust $RUST_MINIMUM or newer is missing: install it from https://rustup.rs"
        # Debian 13 and Ubuntu 24.04 package rustup; before that it comes from its own site.
        if apt-cache policy rustup | grep -q '^  Candidate: [0-9]'; then apt_install rustup; else install_rustup; fi
    fi
    rustup toolchain install stable --profile minimal --no-self-update >/dev/null 2>&1 ||
        die "rustup could not install the stable toolchain"
    export RUSTUP_TOOLCHAIN=stable
    have cargo || die "cargo is still missing after rustup ran"
    version_at_least "$(rust_version)" "$RUST_MINIMUM" || die "Rust $(rust_version) is older than $RUST_MINIMUM"
}

# Fetches rustup as its makers describe for those who do not pipe scripts into a shell, checks its
# sum, and runs it without a toolchain of its own choice.
install_rustup() {
    local dir base
    base=https://static.rust-lang.org/rustup/dist/$(uname -m)-unknown-linux-gnu
    apt_install curl ca-certificates
    say "installing rustup from ${base%/dist*}"
    dir=$(mktemp -d)
    curl --proto '=https' --tlsv1.2 -sSf --retry 3 -o "$dir/rustup-init" "$base/rustup-init"
    curl --proto '=https' --tlsv1.2 -sSf --retry 3 -o "$dir/sum" "$base/rustup-init.sha256"
    echo "$(cut -d' ' -f1 "$dir/sum")  $dir/rustup-init" | sha256sum --check --quiet ||
        die "rustup-init is not what its checksum says"
    chmod +x "$dir/rustup-init"
    "$dir/rustup-init" -y -q --default-toolchain none --no-modify-path >/dev/null 2>&1 ||
        die "rustup-init failed"
    rm -r "$dir"
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
}

# Builds gantryd, gantryctl and the static shim, all optimised, and puts them side by side into
# the directory $1, where gantryd finds the shim.
build_release() {
    local into=$1 shim
    say "building gantryd, gantryctl and gantry-shim (release)"
    (cd "$REPO" && cargo build --quiet --release --locked -p gantryd -p gantryctl)
    shim=$(build_shim)
    install_programs "$CARGO_TARGET_DIR"/release/{gantryd,gantryctl} "$shim" "$into"
}

# Copies the programs to the directory named last; counts those that changed.
install_programs() {
    local into=${*: -1} program
    mkdir -p "$into"
    for program in "${@:1:$#-1}"; do install_changed "$program" "$into/${program##*/}"; done
}

# Builds the static shim and prints its path.
build_shim() {
    local shim
    shim=$("$REPO/deploy/build-shim" | tail -n 1)
    [ -x "$shim" ] || die "deploy/build-shim printed no executable: $shim"
    echo "$shim"
}

# Copies $1 to $2 by rename, so that a running program keeps its own file; counts changes.
INSTALLED=0
install_changed() {
    if cmp -s "$1" "$2"; then return; fi
    install -m 755 "$1" "$2.new"
    mv "$2.new" "$2"
    INSTALLED=$((INSTALLED + 1))
}

# Prints the path of the program $1, built from the Go module in directory $2 by `go $3`, with the
# arguments that follow. Built again only if the module or the arguments have changed.
go_tool() {
    local name=$1 module=$2 command=$3 tools=$CARGO_TARGET_DIR/tools pin go
    shift 3
    pin=$({ find "$module" -name '*.go' | sort | xargs -r cat; cat "$module"/go.{mod,sum}; echo "$command $*"; } | sha256sum | cut -d' ' -f1)
    if [ -x "$tools/$name" ] && [ "$(cat "$tools/$name.pin" 2>/dev/null)" = "$pin" ]; then
        echo "$tools/$name"
        return
    fi
    go=$(find_go || install_go) || return 1
    say "building $name" >&2
    mkdir -p "$tools"
    if ! (cd "$module" && "$go" "$command" -mod=readonly -o "$tools/$name" "$@") >"$tools/$name.log" 2>&1; then
        tail -n 20 "$tools/$name.log" >&2
        say "$name could not be built" >&2
        return 1
    fi
    echo "$pin" >"$tools/$name.pin"
    echo "$tools/$name"
}

# Prints the path of a runc that has what the distribution's may be too old for.
find_new_runc() {
    if is_debian; then apt_install libseccomp-dev pkg-config >&2; fi
    go_tool runc-new "$REPO/tests/conformance/runc" build -tags seccomp github.com/opencontainers/runc
}

# Prints the path of Debian's docker-registry, unpacked below the target directory: installed, its
# package would run it as a service. Fails where the package cannot be had.
find_docker_registry() {
    local dir=$CARGO_TARGET_DIR/tools/docker-registry
    if [ ! -x "$dir/usr/bin/docker-registry" ]; then
        is_debian || return 1
        rm -rf "$dir" && mkdir -p "$dir" || return 1
        (cd "$dir" && { apt-get download -qq docker-registry || { apt-get update -qq && apt-get download -qq docker-registry; }; } &&
            dpkg-deb -x docker-registry_*.deb .) >/dev/null 2>&1 || return 1
    fi
    echo "$dir/usr/bin/docker-registry"
}

# Prints the path of crictl: $CRICTL, the pinned one that was built here before, one built now if
# there is Go or Go can be fetched, or the one in PATH. Fails if there is none.
find_crictl() {
    if [ -n "${CRICTL:-}" ]; then echo "$CRICTL"; return; fi
    go_tool crictl "$REPO/tests/conformance" build \
        -ldflags "-X sigs.k8s.io/cri-tools/pkg/version.Version=$(crictl_version)" \
        sigs.k8s.io/cri-tools/cmd/crictl || type -P crictl
}

crictl_version() { sed -n 's/.*sigs.k8s.io\/cri-tools v\([^ ]*\).*/\1/p' "$REPO/tests/conformance/go.mod"; }

# What the tools need, from their go.mod.
go_minimum() { sed -n 's/^go //p' "$REPO/tests/conformance/go.mod"; }

find_go() {
    local go
    for go in "$(type -P go || true)" /usr/local/go/bin/go /usr/lib/go/bin/go "$CARGO_TARGET_DIR/tools/go/bin/go"; do
        [ -x "$go" ] || continue
        # Distributions have releases that are too old, and some forbid them to fetch a newer one.
        version_at_least "$(GOTOOLCHAIN=local "$go" env GOVERSION | sed 's/^go//; s/[ -].*//')" "$(go_minimum)" || continue
        echo "$go"
        return
    done
    return 1
}

# Puts Go into the target directory and prints its path: the archive that Go itself fetches from
# the module proxy when a module asks for a newer release.
install_go() {
    local version sum name zip dir=$CARGO_TARGET_DIR/tools
    version=$(go_minimum)
    name=golang.org/toolchain@v0.0.1-go$version.linux-$(image_architecture)
    case $version-$(image_architecture) in
        1.26.2-amd64) sum=5c28763f43da5409ea590cf3c3fb1442c6c4e668d8f6af8c44a621a23f39a006 ;;
        1.26.2-arm64) sum=acb5cab2ad9d639b79b9e086a42bbff7c8931e2ceb0fd241c993e29378007e67 ;;
        *) say "no checksum of Go $version for $(image_architecture) is known here" >&2; return 1 ;;
    esac
    if is_debian; then apt_install curl ca-certificates unzip >&2; fi
    say "fetching Go $version" >&2
    mkdir -p "$dir"
    rm -rf "$dir/go" "$dir/go.new"
    zip=$dir/go.zip
    curl --proto '=https' --tlsv1.2 -sSf --retry 3 -o "$zip" \
        "https://proxy.golang.org/${name/@//@v/}.zip" >&2 &&
        echo "$sum  $zip" | sha256sum --check --quiet >&2 &&
        unzip -q -d "$dir/go.new" "$zip" || { say "Go $version could not be fetched" >&2; rm -rf "$zip" "$dir/go.new"; return 1; }
    mv "$dir/go.new/$name" "$dir/go"
    rm -r "$zip" "$dir/go.new"
    # Archives of modules carry no modes.
    chmod +x "$dir"/go/bin/* "$dir"/go/pkg/tool/*/*
    echo "$dir/go/bin/go"
}

# This machine's architecture as images name it.
image_architecture() {
    case $(uname -m) in
        x86_64) echo amd64 ;;
        aarch64) echo arm64 ;;
        *) uname -m ;;
    esac
}

# Writes the directory $1 as an image of one layer named $2, with the entry point $4 (a JSON
# list), to the archive $3, in the format of `docker save`.
make_image() {
    local root=$1 name=$2 out=$3 entrypoint=$4 dir diff
    dir=$(mktemp -d)
    tar -C "$root" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf "$dir/layer.tar" .
    diff=$(sha256sum "$dir/layer.tar" | cut -d' ' -f1)
    cat >"$dir/config.json" <<END
{"architecture": "$(image_architecture)", "os": "linux",
 "config": {"Entrypoint": $entrypoint, "Env": ["PATH=/bin"]},
 "rootfs": {"type": "layers", "diff_ids": ["sha256:$diff"]}}
END
    printf '[{"Config": "config.json", "RepoTags": ["%s"], "Layers": ["layer.tar"]}]\n' "$name" >"$dir/manifest.json"
    tar -C "$dir" -cf "$out" manifest.json config.json layer.tar
    rm -r "$dir"
}

# Writes an image named $1 to the archive $2: this machine's static busybox with all its applets.
make_busybox_image() {
    local name=$1 out=$2 busybox root applet
    busybox=$(static_busybox)
    root=$(mktemp -d)
    chmod 755 "$root"
    mkdir "$root/bin" "$root/etc" "$root/root" "$root/tmp"
    chmod 1777 "$root/tmp"
    cp "$busybox" "$root/bin/busybox"
    for applet in $("$busybox" --list); do
        [ "$applet" = busybox ] || ln "$root/bin/busybox" "$root/bin/$applet"
    done
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    make_image "$root" "$name" "$out" '["/bin/sh"]'
    rm -r "$root"
}

# Waits until the daemon behind socket $1 answers; $2 is its pid, $3 its log.
wait_ready() {
    local i
    for i in $(seq 300); do
        if [ -S "$1" ] && "$CTL" --socket "$1" image list >/dev/null 2>&1; then return; fi
        kill -0 "$2" 2>/dev/null || break
        sleep 0.1
    done
    [ -z "${3:-}" ] || tail -n 20 "$3" >&2
    die "gantryd does not answer on $1"
}
