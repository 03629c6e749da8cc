#!/usr/bin/env bash
# Runs diffusers' own fast pipeline tests against accelerated pipelines.
#
#   tests/upstream/run.sh [CHECKOUT] [-- PYTEST ARGUMENTS]
#
# CHECKOUT (or the variable DIFFUSERS_TESTS) is a checkout of diffusers, of a tag at or before the installed version;
# its `tests` folder is enough. Nothing is downloaded: text encoders and tokenizers are made locally. The tests import
# a few packages of their own, `pip install "ddit-rt[upstream]"`. PYTHON names the interpreter (default: python), OUT
# a folder for the logs (default: a temporary one). What follows `--` goes to pytest, as in `-- -k callback`.
#
# Every test runs once per mode:
#   plain    diffusers as it is
#   exact    each call of a supported pipeline runs plain, then accelerated with threshold=0 and the same random
#            numbers; outputs have to agree bit for bit, errors in type and text
#   coarse   the same with steps of multiples 1, 2, 4, 1, 2, 4, ...; the call may not raise where the plain one does
#            not, its outputs have to agree in type, shape, dtype and device, and be finite where the plain ones are
#   coarser  as coarse, with 1, 4, 2, ...: most of the tests make two steps
# The outputs of accelerated calls go to the tests, so what a test itself demands has to hold, too: that two runs of the
# same pipeline agree, that a saved and loaded one does. None of them compares coarse steps with fixed numbers but the
# test_inference of Wan, which fail plain as well on text encoders made locally.
#
# A pipeline that accelerate() refuses runs plain; the summary counts these with the reason.
#
# Exits with 1 if a test fails accelerated that passes plain, 0 otherwise; without a checkout it says so and exits
# with 0.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python}

checkout=${DIFFUSERS_TESTS:-}
if [[ $# -gt 0 && $1 != -- ]]; then
  checkout=$1
  shift
fi
[[ ${1:-} == -- ]] && shift

if [[ -z $checkout ]]; then
  echo "skipped: no checkout of diffusers; pass its path, or set DIFFUSERS_TESTS."
  exit 0
fi
[[ $(basename "$checkout") == tests && -d $checkout/pipelines ]] && checkout=$(dirname "$(realpath "$checkout")")
if [[ ! -d $checkout/tests/pipelines/flux ]]; then
  echo "$checkout holds no tests/pipelines/flux: pass a checkout of diffusers, with its tests." >&2
  exit 2
fi
missing=$("$python" - << 'END'
from importlib.util import find_spec
print(*(name for name in ("ftfy", "parameterized", "requests_mock") if find_spec(name) is None))
END
)
if [[ -n $missing ]]; then
  echo "skipped: diffusers' tests import $missing: pip install 'ddit-rt[upstream]'."
  exit 0
fi

out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
out=$(realpath "$out")
files=()
for name in flux/test_pipeline_flux flux/test_pipeline_flux_img2img flux/test_pipeline_flux_inpaint \
  wan/test_wan wan/test_wan_22 wan/test_wan_image_to_video wan/test_wan_22_image_to_video; do
  files+=("tests/pipelines/$name.py")
done

cd "$checkout"
export PYTHONPATH="$here:$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
for mode in plain exact coarse coarser; do
  echo "== $mode"
  status=0
  "$python" -m pytest -q -p no:cacheprovider -p upstream_plugin --ddit-mode "$mode" --ddit-log "$out/$mode.json" \
    -W ignore --tb short "$@" "${files[@]}" > "$out/$mode.txt" 2>&1 || status=$?
  tail -n 1 "$out/$mode.txt"
  # 1: tests failed, which the summary judges
  if [[ $status -gt 1 ]]; then
    echo "pytest ended with $status, see $out/$mode.txt" >&2
    exit "$status"
  fi
done
"$python" "$here/upstream_summary.py" "$out"
