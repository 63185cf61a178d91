# Debian's packages without root, for scripts that read this one: private lists, the machine's own mirrors.

# mirror_of TYPE SUITE: one of the machine's own mirrors as a source (deb or deb-src) of that suite; nothing where it knows none.
mirror_of() {
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(COMPONENT) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
        awk -v type="$1" -v suite="$2" '$1 $2 $3 == "DebianDebianmain" && $4 !~ /-/ { print type, $5, suite, "main"; exit }'
}

# private_apt FOLDER ARGUMENT...: apt-get whose lists and downloads lie in FOLDER: neither root nor a fresh
# `apt-get update` of the machine is needed. Sources are the machine's, or those of FOLDER/sources.list where there is one.
private_apt() {
    folder=$1
    shift
    if [ -e "$folder/sources.list" ]; then
        set -- -o Dir::Etc::sourcelist="$folder/sources.list" -o Dir::Etc::sourceparts=/dev/null "$@"
    fi
    mkdir -p "$folder/lists/partial" "$folder/archives/partial"
    apt-get -qq -o Debug::NoLocking=1 -o APT::Sandbox::User= -o Dir::State::lists="$folder/lists" \
        -o Dir::Cache="$folder" -o Dir::Cache::archives="$folder/archives" "$@" >&2
}
