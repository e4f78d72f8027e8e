#!/usr/bin/env bash
# All that wants a GPU, in one go: the tests, the kernels, and the benchmarks of docs/speed.md.
#
#     OUT=folder bash benchmarks/on_gpu.sh [tests] [kernels] [llava] [long] [qwen] [decode]
#
# A part that fails does not stop the others; the logs say so. Needs no network: weights are random.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
methods=fastv,dart,divprune,uniform,visionzip,pyramiddrop,sparsevlm

bench() { python3 -c "from mllm_squeeze.cli import main; main()" bench --ratio 0.75 --device cuda --dtype bfloat16 --method $methods "$@"; }

tests() { python3 -m pytest -v -n 12 -m gpu -p no:cacheprovider --tb=short tests/unit/test_kernels.py tests/contract/test_on_a_gpu.py; }
kernels() { python3 benchmarks/kernels.py --json "$out/kernels.json"; }
llava() {
  bench --model llava-1.5-7b --visual-tokens 2880 --rounds 6 --warmup 2 --decode 8 \
    --against benchmarks/naive.py --out "$out/h100-2880"
}
long() { bench --model llava-1.5-7b --visual-tokens 16128 --rounds 4 --warmup 1 --decode 8 --out "$out/h100-16k"; }
qwen() { bench --model qwen2.5-vl-7b --visual-tokens 16384 --rounds 4 --warmup 1 --decode 8 --out "$out/h100-qwen"; }
decode() {
  bench --model llava-1.5-7b --visual-tokens 2880 --method fastv,divprune --no-oracle --rounds 3 --warmup 2 --decode 33 \
    --cache compiled --out "$out/h100-compiled"
}

for part in "${@:-tests}"; do
  echo "== $part"
  start=$SECONDS
  "$part" > "$out/$part.log" 2>&1
  echo "== $part: exit $?, $((SECONDS - start)) s"
  tail -n "${TAIL:-25}" "$out/$part.log"
done
