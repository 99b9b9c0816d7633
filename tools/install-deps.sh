#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Installs what building and testing needs and this machine lacks (Debian, Ubuntu), and checks
# Rust. Says nothing and touches nothing if all is there.
set -eu
cd "$(dirname "$0")/.."

has() {
    command -v "$1" >/dev/null 2>&1
}

compiles() {
    echo "#include <$1>" | cc -E - >/dev/null 2>&1
}

missing=
has cc || missing="$missing gcc"
has cc && compiles stdio.h || missing="$missing libc6-dev"
has make || missing="$missing make"
has pkg-config || missing="$missing pkg-config"
has cc && compiles libelf.h && compiles zlib.h || missing="$missing libelf-dev"
has clang || missing="$missing clang"
has ip && has tc || missing="$missing iproute2"
has ethtool || missing="$missing ethtool"
has tshark || missing="$missing tshark"
# names of ports
[ -e /etc/services ] || missing="$missing netbase"

if [ -n "$missing" ]; then
    if ! has apt-get; then
        echo "Please install what these Debian packages hold:$missing" >&2
        exit 1
    fi
    sudo=
    if [ "$(id -u)" != 0 ]; then
        if ! has sudo; then
            echo "Please run as root: apt-get install --no-install-recommends$missing" >&2
            exit 1
        fi
        sudo=sudo
    fi
    echo "Installing:$missing"
    # shellcheck disable=SC2086 # one word a package
    install() {
        $sudo env DEBIAN_FRONTEND=noninteractive \
            apt-get install -qq -y --no-install-recommends $missing >/dev/null
    }
    # Only a machine without package lists, or with old ones, has to update them.
    install 2>/dev/null || { $sudo apt-get update -qq && install; }
fi

wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
advice="Get it from https://rustup.rs (or, with rustup: rustup update stable)."
if ! has cargo; then
    echo "Rust $wanted or later is needed, and there is no cargo in PATH. $advice" >&2
    echo "If you ran make through sudo: run it as yourself, it calls sudo where needed." >&2
    exit 1
fi
found=$(rustc --version | cut -d ' ' -f 2 | cut -d - -f 1)
if [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
    echo "Rust $wanted or later is needed; this is $found ($(command -v rustc)). $advice" >&2
    exit 1
fi

# The BPF code is known to compile with clang 14.
found=$(clang -dumpversion | cut -d . -f 1)
if [ "$found" -lt 14 ]; then
    echo "clang 14 or later is needed; this is $found ($(command -v clang))." >&2
    exit 1
fi
