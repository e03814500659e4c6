# Sourced by the other scripts: makes a virtual environment from constraints.txt and puts it first on PATH.
#   make_environment FOLDER EXTRAS
# A folder that already holds what pyproject.toml and constraints.txt ask for is used as it is.

make_environment() {
    local folder=$1 extras=$2
    local wanted
    wanted=$(cat pyproject.toml constraints.txt <(echo "$extras") | sha256sum | cut -d' ' -f1)
    if [ ! -x "$folder/bin/python" ]; then
        echo "Making $folder ..."
        "${PYTHON:-python3}" -m venv "$folder"
    fi
    if [ "$(cat "$folder/.installed-$extras" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing into $folder (the versions of constraints.txt; this takes some minutes) ..."
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
        echo "$wanted" >"$folder/.installed-$extras"
    fi
    PATH="$PWD/$folder/bin:$PATH"
    export PATH
}

# Threads that wait spin by default; on a machine with few, busy cores that costs several times the work itself.
export OMP_WAIT_POLICY=PASSIVE
