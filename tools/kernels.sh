#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Boots stock kernels of Debian in qemu, without KVM, and runs tools/kernels/suite in each.
# Usage: tools/kernels.sh [--optional] CACHE PROGRAM... (`make kernels` builds the programs)
#
# Kernels and qemu come as Debian packages, by apt-get download: nothing is installed. They are
# kept, unpacked, in the folder CACHE; packages put into CACHE/debs are taken first. Where they
# cannot be had, this says so and fails; with --optional, that is no failure. What the machines said
# stays in CACHE, as SERIES.result and SERIES.console.
set -u
cd "$(dirname "$0")/.."

kernels='6.1 6.12'
# Which tables of packets: some, or all, which take longer.
rows=${ROWS:-some}
# Seconds for all kernels, which run side by side.
cap=1200
[ "$rows" = some ] || cap=1800

optional=
if [ "$1" = --optional ]; then
    optional=yes
    shift
fi
cache=$1
shift

mkdir -p "$cache/debs"
cache=$(cd "$cache" && pwd)
work=$(mktemp -d "$cache/work.XXXXXX")
machines=

clean_up() {
    status=$?
    trap - EXIT
    for machine in $machines; do
        kill "$machine" 2>/dev/null
    done
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

fail() {
    printf 'kernels: %s\n' "$1" >&2
    exit 1
}

# For what is missing here, and is no fault of the program under test.
cannot() {
    printf '\nKERNELS NOT RUN: %s\n%s\n\n' "$1" "$2" >&2
    [ -n "$optional" ] && exit 0
    exit 1
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# ---- packages --------------------------------------------------------------------------------

# Downloads packages to $work/debs.
download() {
    mkdir -p "$work/debs"
    # apt's own user cannot write here, which it would remark on.
    (cd "$work/debs" && apt-get download -qq -o APT::Sandbox::User="$(id -un)" "$@") \
        >"$work/apt.log" 2>&1
}

# The newest stock cloud kernel of a series, as a package's name.
kernel_package() {
    series=$(printf '%s' "$1" | sed 's/\./\\./g')
    apt-cache search --names-only "^linux-image-$series\.[0-9].*-cloud-amd64$" 2>/dev/null |
        cut -d ' ' -f 1 | sort -V | tail -n 1
}

# Unpacks what is needed of a kernel's package: get_kernel SERIES
get_kernel() {
    target=$cache/linux-$1
    [ ! -e "$target" ] || return 0
    deb=$(find "$cache/debs" -name "linux-image-$1.*-cloud-amd64_*.deb" | sort -V | tail -n 1)
    if [ -z "$deb" ]; then
        package=$(kernel_package "$1")
        [ -n "$package" ] && download "$package" || return
        deb=$(find "$work/debs" -name "$package"_*.deb)
    fi
    dpkg -x "$deb" "$work/linux-$1" || return
    mkdir -p "$work/kernel-$1/modules"
    cp "$work/linux-$1"/boot/vmlinuz-* "$work/kernel-$1/vmlinuz" || return
    for module in veth sch_ingress cls_bpf; do
        file=$(find "$work/linux-$1/" -name "$module.ko*")
        case $file in
        *.ko) cp "$file" "$work/kernel-$1/modules/" ;;
        *.xz) xz -dc "$file" >"$work/kernel-$1/modules/$module.ko" ;;
        *) return 1 ;;
        esac || return
    done
    rm -rf "$work/linux-$1"
    mv "$work/kernel-$1" "$target"
}

# Whatever apt would install to have qemu here, unpacked.
get_qemu() {
    [ ! -e "$cache/qemu" ] || return 0
    mkdir "$work/qemu"
    if [ -n "$(find "$cache/debs" -name 'qemu-system-x86_*.deb')" ]; then
        debs=$(find "$cache/debs" -name '*.deb' ! -name 'linux-image-*')
    else
        # Some of it may be installed; what apt would remove stays.
        packages=$(apt-get -s install --no-install-recommends qemu-system-x86 busybox-static \
            2>"$work/apt.log" | sed -n 's/^Inst \([^ ]*\) .*/\1/p')
        if [ -z "$packages" ]; then
            has qemu-system-x86_64 && [ -n "$(busybox)" ] || return
        else
            # shellcheck disable=SC2086 # one word a package
            download $packages || return
        fi
        debs=$(find "$work/debs" -name '*.deb' ! -name 'linux-image-*' 2>/dev/null)
    fi
    for deb in $debs; do
        dpkg -x "$deb" "$work/qemu" || return
    done
    mv "$work/qemu" "$cache/qemu"
}

# A static busybox: ours or the system's.
busybox() {
    for file in "$cache"/qemu/bin/busybox "$cache"/qemu/usr/bin/busybox /bin/busybox; do
        if [ -x "$file" ] && ! ldd "$file" >/dev/null 2>&1; then
            echo "$file"
            return
        fi
    done
}

# Runs the qemu that was unpacked, else the system's.
qemu() {
    if [ ! -x "$cache/qemu/usr/bin/qemu-system-x86_64" ]; then
        exec qemu-system-x86_64 "$@"
    fi
    libraries=$cache/qemu/lib/x86_64-linux-gnu:$cache/qemu/usr/lib/x86_64-linux-gnu
    LD_LIBRARY_PATH=$libraries exec "$cache/qemu/usr/bin/qemu-system-x86_64" \
        -L "$cache/qemu/usr/share/qemu" -L "$cache/qemu/usr/share/seabios" "$@"
}

# ---- the machine -----------------------------------------------------------------------------

# Copies programs with their libraries into a root file system: add ROOT PROGRAM...
add() {
    root=$1
    shift
    cp "$@" "$root/sbin/" || return
    for library in $(ldd "$@" | grep -o '/[^ :]*\.so[^ :]*' | sort -u); do
        mkdir -p "$root${library%/*}"
        cp -u "$library" "$root$library" || return
    done
}

# The root file system of a kernel, packed: pack SERIES PROGRAM...
pack() {
    series=$1
    shift
    root=$work/root-$series
    for folder in bin dev etc modules proc run sbin sys tmp; do
        mkdir -p "$root/$folder"
    done
    cp "$(busybox)" "$root/bin/busybox" &&
        ln -s busybox "$root/bin/sh" &&
        cp "$cache/linux-$series"/modules/*.ko "$root/modules/" &&
        cp /etc/services "$root/etc/" &&
        cp tools/kernels/init tools/kernels/suite tools/kernels/rows "$root/" &&
        add "$root" "$@" "$(command -v ip)" "$(command -v tc)" "$(command -v ethtool)" &&
        (cd "$root" && find . | "$(busybox)" cpio -o -H newc) >"$work/$series.cpio" 2>/dev/null
}

# Becomes the machine of a kernel. Words like ROWS=some become the environment of its init.
boot() {
    qemu -M q35 -accel tcg,thread=multi -cpu max -smp 1 -m 512 -nodefaults -no-user-config \
        -display none -no-reboot -serial "file:$cache/$1.console" -serial "file:$cache/$1.result" \
        -kernel "$cache/linux-$1/vmlinuz" -initrd "$work/$1.cpio" \
        -append "console=ttyS0 panic=-1 ROWS=$rows" </dev/null >"$cache/$1.qemu" 2>&1
}

# ---- verdicts --------------------------------------------------------------------------------

# What the suite said, without the serial line's carriage returns.
said() {
    tr -d '\r' <"$cache/$1.result"
}

# What a kernel says of itself when something is wrong in it.
complaints() {
    grep -a -E 'BUG:|WARNING:|Oops|general protection|Kernel panic|stall' "$cache/$1.console"
}

judge() {
    said "$1" | grep '^# \|^not ok'
    verdict=$(said "$1" | tail -n 1)
    case $verdict in
    PASS*)
        if complaints "$1"; then
            echo "Linux $1: all passed, but the kernel complained: $cache/$1.console"
            return 1
        fi
        echo "Linux $1: $verdict"
        ;;
    FAIL*)
        echo "Linux $1: $verdict"
        complaints "$1"
        return 1
        ;;
    *)
        echo "Linux $1: no verdict after $2 s; the last it said was: $verdict"
        cat "$cache/$1.qemu"
        tail -n 40 "$cache/$1.console"
        return 1
        ;;
    esac
}

[ "$(dpkg --print-architecture 2>/dev/null)" = amd64 ] ||
    cannot "they are Debian's, for amd64, and this is another system." \
        "Run this on Debian, amd64."
for program in apt-get apt-cache xz; do
    has $program || cannot "there is no $program." "Install it."
done
advice="With a network, on Debian 12: apt-get update. Else put the packages into $cache/debs."
get_qemu ||
    cannot "apt cannot get qemu-system-x86 and busybox-static. $(cat "$work/apt.log")" "$advice"
found=
missing=
for series in $kernels; do
    if get_kernel "$series"; then found="$found $series"; else missing="$missing $series"; fi
done
[ -n "$found" ] || cannot "apt cannot get linux-image-SERIES*-cloud-amd64 of$missing." "$advice"
kernels=$found

for series in $kernels; do
    pack "$series" "$@" || fail "cannot make the machine of Linux $series"
done
for series in $kernels; do
    rm -f "$cache/$series".*
    boot "$series" &
    machines="$machines $!"
    eval "machine_$(echo "$series" | tr . _)=$!"
done
status=0
waited=0
for series in $kernels; do
    eval "machine=\$machine_$(echo "$series" | tr . _)"
    while kill -0 "$machine" 2>/dev/null && [ $waited -lt $cap ]; do
        sleep 1
        waited=$((waited + 1))
    done
    judge "$series" $waited || status=1
done
[ -z "$missing" ] ||
    (cannot "apt cannot get linux-image-SERIES*-cloud-amd64 of$missing." "$advice") || status=1
exit $status
