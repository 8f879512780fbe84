# shellcheck shell=bash
# Where this machine gets Debian's packages from. Scripts that install a Debian of their own source it.

host_suite() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

# The address of the archive that this machine installs its packages from.
archive_address() {
	local address
	address=$(archive_of_lists)
	if [[ -z $address ]]; then # a machine whose lists were never fetched
		apt-get -qq update >&2
		address=$(archive_of_lists)
	fi
	[[ $address ]] || die "no Debian archive in apt's sources"
	echo "$address"
}

archive_of_lists() {
	# shellcheck disable=SC2016 # apt-get is to expand this
	apt-get indextargets --format '$(REPO_URI)' "Codename: $(host_suite)" 'Component: main' | head -n 1
}
