#!/usr/bin/env bash
# On a machine with a GPU: builds, runs the GPU tests, then the benchmarks, in less than ten minutes.
# Nothing is downloaded: python3, or the interpreter that PYTHON names, has torch, triton, rich,
# matplotlib, and for the tests pytest.
#
#     bench/gpu.sh [FOLDER]
#
# Results and pictures go to bench/results/; a FOLDER gets copies, and the logs. Fails where a test
# does, or a part cannot be run.
# Where the sources come without their repository, set COMMIT to the commit that they are.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
touch "$work/start"
summary=()
failed=0
export PYTHONUNBUFFERED=1

# run NAME SECONDS COMMAND...: the command with a log and a time limit
run() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    echo "== $name: $*"
    timeout --signal=INT --kill-after=20 "$limit" "$@" 2>&1 | tee "$work/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) summary+=("$name: done in $((SECONDS - start)) s") ;;
        124 | 137) summary+=("$name: STOPPED after $((SECONDS - start)) s, its time was up") ;;
        *) summary+=("$name: FAILED with status $status after $((SECONDS - start)) s") ;;
    esac
    return "$status"
}

# For a Python without pip, pybind11 or a setuptools that knows pyproject.toml: into a folder of its
# own, with the headers of pybind11 that torch has.
build_apart() {
    local site=$work/site
    mkdir -p "$site/fastopt.egg-info" "$work/source" "$work/shim/pybind11"
    cp -r fastopt "$site" && cp -r kernels "$site/fastopt" && cp -r setup.py csrc "$work/source"
    sed -n 's/^version = "\(.*\)"/Metadata-Version: 2.1\nName: fastopt\nVersion: \1/p' \
        pyproject.toml >"$site/fastopt.egg-info/PKG-INFO"
    cat >"$work/shim/pybind11/setup_helpers.py" <<'END'
from setuptools import Extension


def Pybind11Extension(*args, cxx_std, extra_compile_args, **others):
    flags = [f"-std=c++{cxx_std}", "-fvisibility=hidden", *extra_compile_args]
    return Extension(*args, language="c++", extra_compile_args=flags, **others)
END
    CPLUS_INCLUDE_PATH=$("$python" -c 'import torch; print(f"{torch.__path__[0]}/include")')
    export CPLUS_INCLUDE_PATH
    (cd "$work/source" && PYTHONPATH=$work/shim run build-apart 120 \
        "$python" setup.py --quiet build_ext --build-lib "$site")
}

if ! run build 120 "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .; then
    if build_apart; then
        summary+=("build: apart, because pip failed")
        export PYTHONSAFEPATH=1 PYTHONPATH=$work/site:$PWD
    else
        failed=1
    fi
fi
"$python" -m fastopt | tee "$work/machine.log"
nvidia-smi 2>&1 | tee -a "$work/machine.log"

# The benchmarks are left at least four minutes.
if "$python" -c 'import pytest' 2>/dev/null; then
    run tests $((330 - SECONDS)) "$python" -m pytest tests/gpu/test_gpu.py tests/gpu/test_triton_bits.py \
        -q -ra --tb=short --maxfail=40 --durations=10 -p no:cacheprovider || failed=1
    summary+=("$(tail -n 1 "$work/tests.log")")
else
    summary+=("tests: not run, there is no pytest")
fi
# Whoever has less time gets what is finished by then: the first come first.
run bench $((560 - SECONDS)) "$python" -m bench run --device cuda \
    --workload tinyllama-1.1b --workload small-1000x1000 --workload gpt2 \
    --workload overhead --workload startup --workload memory || failed=1
results=$(sed -n 's/^Saved as //p' "$work/bench.log")
if [ -n "$results" ]; then
    run plot 60 "$python" -m bench plot "$results" || failed=1
fi

if [ $# -gt 0 ]; then
    mkdir -p "$1"
    find bench/results -type f -newer "$work/start" -exec cp {} "$1" \;
    cp "$work"/*.log "$1"
fi
echo "== summary"
grep --no-filename ' reached' "$work/bench.log"
printf '%s\n' "${summary[@]}"
rm -rf "$work"
exit "$failed"
