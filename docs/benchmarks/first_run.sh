#!/usr/bin/env bash
# The first run on real images: CIFAR-10, 2 %, on a CPU. Every step resumes: run it again after an interruption.
#   docs/benchmarks/first_run.sh cifar10-train.parquet OUT
# Then: python docs/benchmarks/first_run.py OUT > docs/benchmarks/first-run.md
set -euo pipefail
images=$1 out=$2
export D2C_DEVICE=cpu D2C_WORKSPACE=$out/workspace
model="--model sit-tiny/4 --recipe small --steps 1500"

# sit-tiny/4 has 8 x 8 tokens, a quarter of what the default (the grid of a /2 model) would cost a CPU.
attach="--grid 8"

d2c score "$images" --gpus 2
for seed in 0 1 2; do
  # Interval sampling has no randomness: its three runs differ in the training seed. Random draws differ in both.
  d2c pack --ratio 0.02 $attach --licence LicenseRef-CIFAR-10 --out "$out/interval"
  d2c pack --ratio 0.02 $attach --method random --seed $seed --licence LicenseRef-CIFAR-10 --out "$out/random-$seed"
  d2c pack --ratio 0.02 --method random --seed $seed --text none --vision none --licence LicenseRef-CIFAR-10 \
    --out "$out/random-plain-$seed"
  for shards in interval random-$seed random-plain-$seed; do
    run=$out/runs/${shards%-"$seed"}-$seed
    d2c train "$out/$shards" $model --seed $seed --out "$run"
    d2c fid "$run" --samples 1000 --sampling-steps 20
  done
done
