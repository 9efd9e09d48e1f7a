#!/usr/bin/env bash
# What mirror images are worth, and how to mirror vision tokens: CIFAR-10 at 16 px, 10 random images a class, on a CPU.
# Every step resumes: run it again after an interruption.
#   docs/benchmarks/flips.sh cifar10-train.parquet OUT [SCORER]
# Then: python docs/benchmarks/flips.py OUT > docs/benchmarks/flips.md
set -euo pipefail
images=$1 out=$2 scorer=${3:-train}
export D2C_DEVICE=cpu D2C_WORKSPACE=$out/workspace OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 IMAGES=$images

d2c score "$images" --size 16 --codec rgb --scorer "$scorer" --evals 8 --gpus 2
for seed in 0 1 2; do
  d2c pack --per-class 10 --method random --seed $seed --text hashed --vision scorer --grid 4 --views orig,hflip \
    --tokens fp16 --licence LicenseRef-CIFAR-10 --out "$out/shards/flips-$seed"
done

one() {
  run=$2/runs/flip-$1 seed=${1##*-}
  d2c train "$2/shards/flips-$seed" --model sit-tiny/4 --recipe small --steps 3000 --seed "$seed" \
    --set "flip=${1%-*}" --held-out "$IMAGES" --watch-every 1000 --out "$run"
  d2c fid "$run" --samples 2000 --sampling-steps 20
}
export -f one
# The first alone, since it trains the measuring network.
one none-0 "$out"
for seed in 0 1 2; do
  for flip in none grid stored; do echo $flip-$seed; done
done | xargs -P "${JOBS:-2}" -I {} bash -c 'one "$1" "$2"' _ {} "$out"
