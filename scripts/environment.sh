# Sourced by the other scripts: makes a virtual environment from constraints.txt and puts it first on PATH.
#   make_environment FOLDER EXTRAS
# A folder that already holds what pyproject.toml and constraints.txt ask for is used as it is.

make_environment() {
    local folder=$1 extras=$2
    local wanted
    wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
    if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "Making $folder ..."
        "${PYTHON:-python3}" -m venv "$folder"
    fi
    # One line for each extra that is installed, with the hash of what asked for it.
    local stamp=$folder/.installed extra missing=
    for extra in ${extras//,/ }; do
        grep -qsx "$extra $wanted" "$stamp" || missing=yes
    done
    if [ -n "$missing" ]; then
        echo "Installing into $folder (the versions of constraints.txt; this takes some minutes) ..."
        # --no-compile: of 25,000 modules a run imports one in eight, and Python compiles those when it does.
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
            -c constraints.txt -e ".[$extras]"
        for extra in ${extras//,/ }; do echo "$extra $wanted" >>"$stamp"; done
    fi
    PATH="$(cd "$folder" && pwd)/bin:$PATH"
    export PATH
}

# Threads that wait spin by default; on a machine with few, busy cores that costs several times the work itself.
export OMP_WAIT_POLICY=PASSIVE
