# shellcheck shell=bash
# OCI images made of folders, as archives that `ctr images import FILE` takes. Scripts that make images source it.

digest() { sha256sum "$1" | cut -d ' ' -f 1; }

# Write an archive ($1) of a folder ($2) that depends on nothing but names and contents.
archive() {
	tar --create --file "$1" --directory "$2" --format=gnu --sort=name --mtime=@0 --numeric-owner \
		--owner="${3:-0}" --group="${3:-0}" "${@:4}"
}

# Move a file ($2) to the blobs of an image ($1), and say its media type ($3), digest and size.
blob() {
	local sha256 size
	sha256=$(digest "$2")
	size=$(stat -c %s "$2")
	mv "$2" "$1/blobs/sha256/$sha256"
	printf '{"mediaType":"application/vnd.oci.image.%s","digest":"sha256:%s","size":%d' \
		"$3" "$sha256" "$size"
}

# Write an image's archive ($1) of its name ($2), the fields of its configuration in JSON ($3), and
# archives of its layers, lowest first.
image() {
	local out=$1 name=$2 config=$3 layout layers=() diff_ids=() layer work architecture manifest
	shift 3
	work=$(dirname "$out")
	architecture=$(dpkg --print-architecture)
	layout=$work/layout
	rm -rf "$layout"
	mkdir -p "$layout/blobs/sha256"
	for layer; do
		diff_ids+=("\"sha256:$(digest "$layer")\"")
		layers+=("$(blob "$layout" "$layer" layer.v1.tar)}")
	done
	printf '{"architecture":"%s","os":"linux","created":"1970-01-01T00:00:00Z",' "$architecture" \
		>"$work/config"
	printf '"config":{%s},"rootfs":{"type":"layers","diff_ids":[%s]}}' "$config" \
		"$(join "${diff_ids[@]}")" >>"$work/config"
	printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",' \
		>"$work/manifest"
	printf '"config":%s},"layers":[%s]}' "$(blob "$layout" "$work/config" config.v1+json)" \
		"$(join "${layers[@]}")" >>"$work/manifest"
	manifest=$(blob "$layout" "$work/manifest" manifest.v1+json)
	printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[' \
		>"$layout/index.json"
	printf '%s,"platform":{"architecture":"%s","os":"linux"},"annotations":{' "$manifest" \
		"$architecture" >>"$layout/index.json"
	printf '"io.containerd.image.name":"%s","org.opencontainers.image.ref.name":"%s"}}]}' \
		"$name" "${name##*:}" >>"$layout/index.json"
	printf '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
	archive "$out" "$layout" 0 oci-layout index.json blobs
	rm -rf "$layout"
	say "$name: $(($(stat -c %s "$out") / 1024)) KiB"
}

join() { local IFS=,; echo "$*"; }
