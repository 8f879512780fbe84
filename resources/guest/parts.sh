# shellcheck shell=bash
# What a guest has beside its kernel: the agent in an initramfs, and the demo root file system. Scripts that bring
# a kernel source it, after resources/common.sh.

# Everything that decides what the agent is.
agent_hash() {
	{
		uname -m
		rustc --version
		dpkg-query -W -f '${Package} ${Version}\n' libc6-dev
		cd "$workspace"
		find Cargo.lock Cargo.toml agent protocol resources/common.sh resources/guest/parts.sh -type f -print0 |
			sort -z | xargs -0 sha256sum
	} | sha256sum | cut -c 1-16
}

# Everything that decides what is made for a kernel ($1), whose folder has its own hash in its name, and an agent ($2).
guest_hash() {
	{
		basename "$1"
		basename "$2"
		dpkg-query -W -f '${Package} ${Version}\n' erofs-utils
		cd "$workspace"
		find resources/common.sh resources/guest/parts.sh resources/guest/initramfs resources/guest/rootfs \
			-type f -print0 | sort -z | xargs -0 sha256sum
	} | sha256sum | cut -c 1-16
}

# Make sure that one of these is made at a time.
lock_guests() {
	mkdir -p "$cache"
	exec {lock}>"$cache/guest.lock"
	flock -n "$lock" || { say "waiting for another build"; flock "$lock"; }
}

# Build the agent, unless it is there, and say in which folder it is.
make_agent() (
	out=$cache/agent-$(agent_hash)
	lock_guests
	if [[ ! -d $out ]]; then
		rm -rf "$cache"/.agent-* # left by a build that was killed
		work=$(mktemp -d "$cache/.agent-XXXXXX")
		trap 'rm -rf "$work"' EXIT
		trap 'exit 130' INT TERM HUP
		say "building the agent"
		target=$(rustc -vV | sed -n 's/^host: //p')
		cd "$workspace"
		# Another working tree may have built its own agent there, which cargo would take for this one.
		cargo clean --quiet --release --package agent --package protocol --target "$target" \
			--target-dir "$cache/agent-target" >&2
		RUSTFLAGS=$(release_flags "$cache/agent-target")
		build_agent "$cache/agent-target" >&2
		install -D -m 0755 "$cache/agent-target/$target/release/podvmm-agent" "$work/out/podvmm-agent"
		mv -T "$work/out" "$out"
	fi
	echo "$out"
)

# Make the guest's folder for a kernel ($1), unless it is there, and say where it is. The kernel's folder has vmlinux
# and bzImage. It may have modules, which the agent loads, and transport, by which the kernel finds its devices.
make_guest() (
	kernel=$1
	install_packages erofs-utils
	agent=$(make_agent)
	out=$cache/guest-$(guest_hash "$kernel" "$agent")
	lock_guests
	if [[ ! -d $out ]]; then
		rm -rf "$cache"/.guest-* # left by a build that was killed
		work=$(mktemp -d "$cache/.guest-XXXXXX")
		trap 'rm -rf "$work"' EXIT
		trap 'exit 130' INT TERM HUP
		mkdir "$work/out"
		"$workspace/resources/guest/initramfs/build" "$agent/podvmm-agent" "$work/out/initramfs.cpio" \
			"$kernel/modules"
		busybox=$(fetch_busybox)
		"$workspace/resources/guest/rootfs/build" "$busybox" erofs "$work/out/rootfs.erofs"
		ln -s "../$(basename "$kernel")"/{vmlinux,bzImage} "$work/out"
		[[ ! -e $kernel/transport ]] || cp "$kernel/transport" "$work/out"
		mv -T "$work/out" "$out"
	fi
	echo "$out"
)

# Show podvmm a guest ($1), which it uses when it is told of none.
link_guest() {
	ln -sfn "$(basename "$1")" "$cache/.guest-link.$$"
	mv -T "$cache/.guest-link.$$" "$cache/guest"
}
