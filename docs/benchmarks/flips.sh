#!/usr/bin/env bash
# What mirror images are worth, and how to mirror vision tokens: CIFAR-10, 10 random images a class, on a CPU.
# Every step resumes: run it again after an interruption.
#   docs/benchmarks/flips.sh cifar10-train.parquet OUT [SCORER]
# Then: python docs/benchmarks/flips.py OUT > docs/benchmarks/flips.md
set -euo pipefail
images=$1 out=$2 scorer=${3:-train}
export D2C_DEVICE=cpu D2C_WORKSPACE=${D2C_WORKSPACE:-$out/workspace} OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1

[ -e "$D2C_WORKSPACE/scores/stage.json" ] || d2c score "$images" --scorer "$scorer" --evals 4 --gpus 2
for seed in 0 1 2; do
  d2c pack --per-class 10 --method random --seed $seed --text hashed --vision scorer --grid 8 --views orig,hflip \
    --tokens fp16 --licence LicenseRef-CIFAR-10 --out "$out/shards/$seed"
done

one() {
  run=$2/runs/$1
  d2c train "$2/shards/${1##*-}" --model sit-tiny/4 --recipe small --steps 1500 --seed "${1##*-}" --set "flip=${1%-*}" --out "$run"
  d2c fid "$run" --samples 1000 --sampling-steps 20
}
export -f one
# The first alone, since it trains the measuring network.
one none-0 "$out"
for seed in 0 1 2; do
  for flip in none grid stored; do echo $flip-$seed; done
done | xargs -P "${JOBS:-2}" -I {} bash -c 'one "$1" "$2"' _ {} "$out"
