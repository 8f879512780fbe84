# shellcheck shell=bash
# What the scripts here share; each sources it.

shopt -s inherit_errexit
export LC_ALL=C
# shellcheck disable=SC2034 # for those who source this
cache=${PODVMM_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/podvmm}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# Install those of the given Debian packages that are not there.
install_packages() {
	local package states as_root=() missing=()
	command -v dpkg-query >/dev/null || die "needs Debian 12 or 13: dpkg-query not found"
	states=$(dpkg-query -W -f '${Package}=${db:Status-Status} ' "$@" 2>/dev/null || true)
	for package; do
		[[ " $states" == *" $package=installed "* ]] || missing+=("$package")
	done
	((${#missing[@]})) || return 0
	if ((EUID != 0)); then
		sudo -n true 2>/dev/null || die "run as root, or first: apt-get install ${missing[*]}"
		as_root=(sudo -n)
	fi
	say "installing ${missing[*]}"
	local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600)
	"${as_root[@]}" "${apt[@]}" update >&2
	"${as_root[@]}" "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >&2
}

# Install containerd and what it needs, and other packages, but do not let it be started: those who use this run
# their own.
install_containerd() {
	local policy=/usr/sbin/policy-rc.d ours='' was
	was=$(dpkg-query -W -f '${db:Status-Status}' containerd 2>/dev/null || true)
	if [[ $was != installed && $EUID -eq 0 && ! -e $policy ]]; then
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 0755 "$policy"
		ours=1
	fi
	(install_packages containerd runc containernetworking-plugins iproute2 "$@") || {
		[[ -z $ours ]] || rm -f "$policy"
		return 1
	}
	[[ -z $ours ]] || rm -f "$policy"
	# The package has it started at the next boot.
	[[ $was == installed ]] || systemctl disable --quiet containerd.service 2>/dev/null || true
}

# Make cargo usable, of the version that the workspace ($1) asks for, with the given components.
need_rust() {
	local workspace=$1 wanted found component
	shift
	command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
	wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$workspace/Cargo.toml")
	command -v cargo >/dev/null ||
		die "cargo not found: install Rust $wanted or later with rustup, see www.rust-lang.org"
	found=$(rustc --version | cut -d ' ' -f 2)
	[[ $(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1) == "$wanted" ]] ||
		die "Rust $found is too old: needs $wanted; with rustup: rustup update stable"
	for component; do
		cargo "$component" --version >/dev/null 2>&1 ||
			die "cargo $component not found; with rustup: rustup component add ${component/fmt/rustfmt}"
	done
	install_packages gcc libc6-dev # rustc links with it
}

# Say where the podvmm to be used is: PODVMM_BIN, or the one that is built for tests.
built_podvmm() {
	if [[ -z ${PODVMM_BIN:-} ]]; then
		cargo build --locked --quiet --package vmm --bin podvmm >&2
		PODVMM_BIN=${CARGO_TARGET_DIR:-target}/debug/podvmm
	fi
	realpath "$PODVMM_BIN"
}

# Say where the static program with the guest's ends of transfers is, built if it is not.
built_guest_load() {
	local triple=x86_64-unknown-linux-gnu target=${CARGO_TARGET_DIR:-$workspace/target}/guest
	RUSTFLAGS='-C target-feature=+crt-static' CARGO_PROFILE_RELEASE_LTO=off cargo build --locked --quiet \
		--release --package guest_load --target $triple --target-dir "$target" >&2
	echo "$target/$triple/release/guest_load"
}

# The folder of the cache that keeps what cargo made of other people's crates for a workspace ($2), under a name
# ($1), for all clones that have the same of them.
kept_crates() {
	local hash
	hash=$({
		rustc -vV
		echo "${CARGO_HOME:-$HOME/.cargo}" # by which its sources are named
		printenv RUSTFLAGS || true
		cat "$2/Cargo.lock" "$2/Cargo.toml"
	} | sha256sum | cut -c 1-16)
	echo "$cache/$1-$hash"
}

# Start a fresh clone's target folder with what another has compiled of other people's crates:
# fetch_crates NAME WORKSPACE TARGET_FOLDER
fetch_crates() {
	local target=$3 kept folder
	kept=$(kept_crates "$1" "$2")
	mkdir -p "$target"
	for folder in "$kept"/*/; do
		folder=$(basename "$folder")
		[[ -d $kept/$folder && ! -d $target/$folder ]] || continue
		say "taking compiled crates from $kept/$folder"
		cp --archive --reflink=auto "$kept/$folder" "$target/.$folder"
		mv -T "$target/.$folder" "$target/$folder"
	done
}

# Keep what was compiled of other people's crates, for the next clone: keep_crates NAME WORKSPACE TARGET_FOLDER
# FOLDER..., which are those below the target folder; with cargo's options for them behind --, if there are any.
keep_crates() {
	local name=$1 manifest=$2/Cargo.toml target=$3 kept work ours
	kept=$(kept_crates "$name" "$2")
	[[ ! -d $kept ]] || return 0
	rm -rf "$cache/.$name"-* # left by a run that was killed
	work=$(mktemp -d "$cache/.$name-XXXXXX")
	shift 3
	while (($#)) && [[ $1 != -- ]]; do
		mkdir -p "$work/$1"
		cp --archive --reflink=auto "$target/$1"/{.fingerprint,build,deps} "$work/$1"
		shift
	done
	mapfile -t ours < <(cargo tree --manifest-path "$manifest" --workspace --offline --prefix none |
		sed -nE 's|^([^ ]+) v[^ ]+ \(/.*|--package=\1|p' | sort -u)
	cargo clean --manifest-path "$manifest" --quiet --offline --target-dir "$work" "${@:2}" "${ours[@]}"
	# Programs of crates outside the workspace, such as tests/library.rs builds.
	find "$work" -path '*/deps/*' -type f ! -name 'lib*' ! -name '*.d' -delete
	rm -rf "$cache/$name"-*
	mv -T "$work" "$kept"
}

# Put the server of shared files that tests hold podvmm's against on the path.
need_virtiofsd() { install_crate virtiofsd 1.14.0; }

# Copy programs, and all that they use, to a node ($1), each to where it is here.
fill_node() {
	local node=$1 copied
	need_virtiofsd
	copied=("${@:2}" "$PODVMM_BIN" "$PODVMM_SHIM" "$PODVMM_GUEST_LOAD" "$PODVMM_GUEST"
		"$(dirname "$(readlink -f "$PODVMM_GUEST/vmlinux")")" "$cache/busybox-static"
		"$PODVMM_TEST_IMAGES" "$workspace/resources" "$(command -v virtiofsd)")
	tar --create --sparse --directory / "${copied[@]#/}" |
		"$workspace/resources/node" run "$node" tar --extract --sparse --directory /
	"$workspace/resources/node" run "$node" mkdir -p "$workspace"/{tests,benches,target/tmp}
	"$workspace/resources/node" run "$node" ln -sf "$(command -v virtiofsd)" /usr/local/bin
}

# Flags for rustc by which a program does not tell where it was built: release_flags TARGET_FOLDER. There is what the
# build generates; cargo names files of the workspace by where they are in it, but not those of other crates.
release_flags() {
	local folder flags="--remap-path-prefix=$1=/podvmm" commit
	for folder in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/; do
		flags+=" --remap-path-prefix=${folder%/}=/crates"
	done
	commit=$(rustc -vV | sed -n 's/^commit-hash: //p')
	echo "$flags --remap-path-prefix=$(rustc --print sysroot)/lib/rustlib/src/rust=/rustc/$commit"
}

# Build the agent, small and static: it is unpacked, loaded and started by a guest's kernel at each boot. It goes
# to the folder for this machine's kind below a target folder: build_agent TARGET_FOLDER
build_agent() (
	unset CARGO_ENCODED_RUSTFLAGS
	export CARGO_PROFILE_RELEASE_OPT_LEVEL=z
	export RUSTFLAGS="${RUSTFLAGS:+$RUSTFLAGS }-C target-feature=+crt-static -C relocation-model=static"
	cargo build --release --locked --package agent --target "$(rustc -vV | sed -n 's/^host: //p')" --target-dir "$1"
)

# Put a program of crates.io ($1, version $2) into the cache, unless it is there, and on the path.
install_crate() {
	local crate=$1 version=$2 root=$cache/crates/$1-$2
	PATH=$root/bin:$PATH
	[[ -e $root/done ]] && return
	say "building $crate $version"
	cargo install "$crate" --version "$version" --locked --quiet --root "$root" >&2
	touch "$root/done"
}

# Say where Debian's static busybox is, fetched without installing it: the host may have another.
fetch_busybox() (
	local kept=$cache/busybox-static
	if [[ ! -x $kept/bin/busybox ]]; then
		say "fetching busybox-static"
		local work
		work=$(mktemp -d "$cache/.busybox-XXXXXX")
		trap 'rm -rf "$work"' EXIT
		cd "$work" || exit
		apt-get -qq download busybox-static >&2 2>/dev/null || {
			((EUID != 0)) || apt-get -qq -o DPkg::Lock::Timeout=600 update >&2
			apt-get -qq download busybox-static >&2
		}
		dpkg-deb -x busybox-static_*.deb tree
		install -D -m 0755 "$(find tree -path '*/bin/busybox' -type f)" new/bin/busybox
		mv -T new "$kept" 2>/dev/null || [[ -x $kept/bin/busybox ]]
	fi
	echo "$kept/bin/busybox"
)
